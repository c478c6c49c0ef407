// The panel's title says what is on, Compare presses Generate, and the memory line is renewed after each generation.

(function() {
    const PANEL = tab => `#script_${tab}_denoiser_fusion_`;

    function find(tab, element) {
        return gradioApp().querySelector(PANEL(tab) + element);
    }

    // The value that a control shows: of a list, a radio, a number or a text; "" where there is no such control.
    function read(tab, element) {
        const control = find(tab, element);
        const input = control && (control.querySelector('input:checked') || control.querySelector('input, textarea'));
        return input ? input.value.trim() : '';
    }

    function summarise(tab) {
        const experts = [1, 2, 3].map(i => read(tab, `expert${i}_checkpoint`)).filter(name => name && name !== 'None');
        const method = read(tab, 'method');
        const names = experts.map(name => name.replace(/^.*[\\/]/, '').replace(/\.\w+$/, '')).join(', ');
        const freeu = read(tab, 'freeu');
        const skipping = read(tab, 'skipping');
        return [
            experts.length ? `${method}: ${names}` : '',
            freeu && freeu !== 'Off' ? `FreeU ${freeu}` : '',
            skipping && skipping !== 'Off' ? `Skipping: ${skipping}` : '',
        ].filter(Boolean).join(' · ');
    }

    function showSummary(tab) {
        const accordion = find(tab, 'enable');
        const title = accordion && accordion.querySelector('.label-wrap > span');
        if (!title) return;
        let badge = title.querySelector('.denoiser-fusion-badge');
        if (!badge) {
            badge = document.createElement('span');
            badge.className = 'denoiser-fusion-badge';
            title.appendChild(badge);
        }
        const on = accordion.visibleCheckbox && accordion.visibleCheckbox.checked;
        const text = on ? summarise(tab) : '';
        if (badge.textContent !== text) badge.textContent = text;
    }

    function renewMemory(tab) {
        const button = find(tab, 'memory_refresh');
        if (button) button.click();
    }

    // One press of Generate with the comparison's switch on.
    function setupCompare(tab) {
        const button = find(tab, 'compare_button');
        const input = gradioApp().querySelector(PANEL(tab) + 'compare input');
        if (!button || !input) return;
        const set = function(on) {
            input.checked = on;
            updateInput(input);
        };
        button.addEventListener('click', function() {
            set(true);
            setTimeout(() => gradioApp().querySelector(`#${tab}_generate`).click(), 100);
            setTimeout(() => set(false), 1000);
        });
    }

    onUiLoaded(function() {
        for (const tab of ['txt2img', 'img2img']) {
            // Presets and pasted settings change values without an event, so the title looks for itself.
            setInterval(() => showSummary(tab), 500);
            setupCompare(tab);
            const log = gradioApp().querySelector(`#html_log_${tab}`);
            if (log) new MutationObserver(() => renewMemory(tab)).observe(log, {childList: true, subtree: true});
        }
    });
})();
