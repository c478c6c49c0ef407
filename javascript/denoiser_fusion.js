// The panel's title says what is on, controls of what is not chosen are hidden, Compare presses Generate, the memory line
// is renewed after each generation, and masks are painted on pictures out of the gallery.

// What events of the panel call.
var denoiserFusion = {};

// A text in the page's language, where the host's localisation has it.
denoiserFusion.translate = text => (window.localization || {})[text] || text;

// The line under the presets, after a control was changed by hand.
denoiserFusion.noteEdit = function(line) {
    const [applied, changed] = ['Applied: {0}', 'Changed since it was applied: {0}'].map(text => {
        return denoiserFusion.translate(text).replace('{0}', '');
    });
    return (line || '').startsWith(applied) ? changed + line.slice(applied.length) : line;
};

(function() {
    // The controls on whose choices others depend, by the classes that panel/controls.py gives these.
    const CHOOSERS = ['method', 'afa_maps', 'freeu', 'skipping', 'guidance'];
    const EXPERTS = [1, 2, 3];
    const SAME_AS_BASE = 'same as base';
    const LORA = /<(?:lora|lyco):([^:>]+)/g;
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

    function isCheckpoint(name) {
        return name !== '' && name !== 'None';
    }

    // An expert's checkpoint, and the LoRAs that its prompt names.
    function nameOf(tab, i) {
        const checkpoint = read(tab, `expert${i}_checkpoint`);
        const loras = [...read(tab, `expert${i}_prompt`).matchAll(LORA)].map(found => found[1]);
        const name = checkpoint.replace(/^.*[\\/]/, '').replace(/\.\w+$/, '');
        return [checkpoint === SAME_AS_BASE && loras.length ? 'base' : name, ...loras].join(' + ');
    }

    function summarise(tab) {
        const translate = denoiserFusion.translate;
        const experts = EXPERTS.filter(i => isCheckpoint(read(tab, `expert${i}_checkpoint`)));
        const method = read(tab, 'method');
        const names = experts.map(i => nameOf(tab, i)).join(', ');
        const freeu = read(tab, 'freeu');
        const skipping = read(tab, 'skipping');
        return [
            experts.length ? `${translate(method)}: ${names}` : '',
            freeu && freeu !== 'Off' ? `FreeU ${translate(freeu)}` : '',
            skipping && skipping !== 'Off' ? `${translate('Skipping')}: ${translate(skipping)}` : '',
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

    // What the experts' places make of use, with a method that has places: the painted ones' canvases, and what is
    // common to all places.
    function placeChoices(tab) {
        if (read(tab, 'method') !== 'SNB') return [];
        const place = i => read(tab, `expert${i}_place`).toLowerCase();
        const used = EXPERTS.filter(i => isCheckpoint(read(tab, `expert${i}_checkpoint`)) && !['', 'auto'].includes(place(i)));
        const painted = EXPERTS.filter(i => place(i).split(' ')[0] === 'mask');
        return [...painted.map(i => `denoiser-fusion-expert${i}-painted`), ...used.map(() => 'denoiser-fusion-places-used')];
    }

    // Two LoRAs as experts of a base without one: the saliency "own" has that base compete with them.
    function loraChoices(tab) {
        const prompt = gradioApp().querySelector(`#${tab}_prompt textarea`);
        const named = text => Boolean(text.match(LORA));
        if (read(tab, 'method') !== 'SNB' || read(tab, 'snb_saliency') === 'divergence' || (prompt && named(prompt.value))) return [];
        const loras = EXPERTS.filter(i => read(tab, `expert${i}_checkpoint`) === SAME_AS_BASE && named(read(tab, `expert${i}_prompt`)));
        return loras.length > 1 ? ['denoiser-fusion-loras-two'] : [];
    }

    // A picture for a canvas, as a PNG's data URL, which every host's canvas takes: the gallery's selected one, its
    // first, or a grey one of the picture's size.
    denoiserFusion.lastPicture = async function(tab) {
        const gallery = gradioApp().querySelector(`#${tab}_gallery`);
        const chosen = gallery && (gallery.querySelector('.thumbnail-item.selected img') || gallery.querySelector('img'));
        const picture = new Image();
        if (chosen) {
            picture.src = chosen.src;
            await picture.decode();
        }
        const size = side => Number(gradioApp().querySelector(`#${tab}_${side} input`).value) || 512;
        const canvas = document.createElement('canvas');
        canvas.width = picture.naturalWidth || size('width');
        canvas.height = picture.naturalHeight || size('height');
        const context = canvas.getContext('2d');
        context.fillStyle = '#808080';
        context.fillRect(0, 0, canvas.width, canvas.height);
        if (chosen) context.drawImage(picture, 0, 0);
        return [canvas.toDataURL()];
    };

    // Empties a canvas; its expert draws by saliency again, unless its place is another one.
    // ``parts``: of how many components the canvas is made.
    denoiserFusion.clear = function(place, parts) {
        return [place.trim().toLowerCase() === 'mask' ? 'auto' : place, ...Array(parts).fill(null)];
    };

    // Forge's own button for removing a picture leaves its data where Gradio has it, so that the same picture would not
    // come again; and only that button brings the hint back that a picture can be put there.
    function setupForgeCanvas(tab, expert) {
        const remove = find(tab, `expert${expert}_canvas [id^="removeButton_"]`);
        if (!remove) return;
        const name = remove.id.replace('removeButton_', '');
        const data = gradioApp().querySelector(`#${name}.logical_image_background textarea`);
        remove.addEventListener('click', () => {
            data.value = '';
            updateInput(data);
        });
        find(tab, `expert${expert}_canvas_clear`).addEventListener('click', () => remove.click());
    }

    // A stroke on an expert's canvas makes the painted mask its place.
    function setupCanvases(tab) {
        for (const i of EXPERTS) {
            const canvas = find(tab, `expert${i}_canvas`);
            if (!canvas) continue;
            setupForgeCanvas(tab, i);
            let painting = false;
            for (const name of ['pointerdown', 'touchstart']) {
                canvas.addEventListener(name, event => {
                    painting = event.target.tagName === 'CANVAS';
                }, true);
            }
            for (const name of ['pointerup', 'touchend']) {
                window.addEventListener(name, () => {
                    if (painting) setPlace(tab, i, 'mask');
                    painting = false;
                });
            }
        }
    }

    function setPlace(tab, expert, place) {
        const input = find(tab, `expert${expert}_place`).querySelector('textarea, input');
        if (input.value.trim() === place) return;
        input.value = place;
        updateInput(input);
    }

    // Shows what is of use with the choices made. Only looks are touched: hidden controls keep their values.
    function showChosen(tab) {
        const panel = find(tab, 'enable');
        if (!panel) return;
        const chosen = CHOOSERS.map(name => {
            return `denoiser-fusion-${name}-${read(tab, name).toLowerCase().replace(/ /g, '-')}`;
        });
        chosen.push(...placeChoices(tab), ...loraChoices(tab));
        for (const element of panel.querySelectorAll('.denoiser-fusion-with')) {
            const shown = chosen.some(name => element.classList.contains(name));
            element.classList.toggle('denoiser-fusion-hidden', !shown);
        }
    }

    // Marks the amount of skipping that the controls have, whoever has set them.
    function showAmount(tab) {
        const most = Number(read(tab, 'skip_max')) || 1;  // 0 is the policy's own, which is 1
        const amount = `denoiser-fusion-amount:${Number(read(tab, 'skip_tolerance'))}:${most}`;
        for (const button of gradioApp().querySelectorAll(`[id^="${PANEL(tab).slice(1)}skip_"].denoiser-fusion-amount`)) {
            const on = read(tab, 'skipping') === 'Forecast' && button.classList.contains(amount);
            button.classList.toggle('denoiser-fusion-on', on);
            button.setAttribute('aria-pressed', String(on));
        }
    }

    // The host gives labels and choices its own hints by their words; within our controls ours hold.
    function keepHints() {
        for (const owner of gradioApp().querySelectorAll('[id*="denoiser_fusion"][title]:not(button)')) {
            for (const inner of owner.querySelectorAll('span, p, input, li')) {
                if (inner.title !== owner.title) inner.title = owner.title;
            }
        }
    }

    // Gradio's folds are no buttons; these can be reached and opened by key.
    function setupFolds(tab) {
        for (const fold of (find(tab, 'enable') || document).querySelectorAll('.denoiser-fusion .label-wrap')) {
            if (fold.tagName === 'BUTTON') continue;
            fold.tabIndex = 0;
            fold.setAttribute('role', 'button');
            fold.addEventListener('keydown', function(event) {
                if (event.key !== 'Enter' && event.key !== ' ') return;
                event.preventDefault();
                fold.click();
            });
        }
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

    // A LoRA's card in the host's gallery goes into the expert's prompt that was written in last, of all prompts of the
    // tab; else where the host puts it. An expert without a checkpoint becomes the base with that LoRA.
    function setupCards() {
        const chosen = {};
        for (const tab of ['txt2img', 'img2img']) {
            for (const i of EXPERTS) {
                const prompt = find(tab, `expert${i}_prompt textarea`);
                prompt?.addEventListener('focus', () => chosen[tab] = {expert: i, prompt});
            }
            for (const name of ['prompt', 'neg_prompt']) {
                const prompt = gradioApp().querySelector(`#${tab}_${name} textarea`);
                prompt?.addEventListener('focus', () => delete chosen[tab]);
            }
        }
        const original = window.cardClicked;
        if (!original) return;
        window.cardClicked = function(tab, text, negative, ...rest) {
            const target = chosen[tab];
            if (!target || !text.match(LORA)) return original(tab, text, negative, ...rest);
            const name = `expert${target.expert}`;
            updatePromptArea(text, target.prompt);
            if (negative) updatePromptArea(negative, find(tab, `${name}_negative_prompt textarea`), true);
            if (!isCheckpoint(read(tab, `${name}_checkpoint`))) find(tab, `${name}_same`).click();
        };
    }

    onUiLoaded(function() {
        setupCards();
        setInterval(keepHints, 500);
        for (const tab of ['txt2img', 'img2img']) {
            // Presets and pasted settings change values without an event, so the panel looks for itself.
            const look = function() {
                showSummary(tab);
                showChosen(tab);
                showAmount(tab);
            };
            setInterval(look, 500);
            look();
            const tabs = find(tab, 'tabs');
            if (tabs) tabs.addEventListener('input', () => setTimeout(look, 50));
            setupFolds(tab);
            setupCompare(tab);
            setupCanvases(tab);
            renewMemory(tab);
            const log = gradioApp().querySelector(`#html_log_${tab}`);
            if (log) new MutationObserver(() => renewMemory(tab)).observe(log, {childList: true, subtree: true});
        }
    });
})();
