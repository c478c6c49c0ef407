// The training tab shows the training that runs, or else the last, once it is opened; it is renewed while one runs.

(function() {
    function watchTraining() {
        const element = name => gradioApp().querySelector(`#denoiser_fusion_training_${name}`);
        let entered = 0, looked = 0;
        setInterval(function() {
            const state = element('state');
            if (!state || state.offsetParent === null) return;
            const now = Date.now();
            if (!state.querySelector('[data-phase]') && now - entered > 10000) {
                entered = now;
                element('enter').click();
            } else if (state.querySelector('[data-running="1"]') && now - looked > 1500) {
                looked = now;
                element('look').click();
            }
        }, 300);
    }

    onUiLoaded(watchTraining);
})();
