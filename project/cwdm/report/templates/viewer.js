"use strict";
// One viewer a case that was asked for; its volumes stand in the page and are unpacked when it is opened.
(() => {
  const AXIAL = 2;

  const open = async (viewer) => {
    const find = (name) => viewer.querySelector(name);
    const stage = find(".stage");
    find(".open").hidden = true;
    stage.hidden = false;
    const nv = new niivue.Niivue({
      backColor: [0, 0, 0, 1],
      crosshairColor: [0.56, 0.76, 0.96, 0.6],
      crosshairWidth: 1,
      dragAndDropEnabled: false,
      isRadiologicalConvention: true,
      isOrientCube: false,
      logLevel: "silent",
      multiplanarShowRender: niivue.SHOW_RENDER.NEVER,
      sagittalNoseLeft: true,
    });
    await nv.attachToCanvas(find("canvas"));
    const sources = [...viewer.querySelectorAll(".volume")];
    const images = await Promise.all(
      sources.map((source) =>
        niivue.NVImage.loadFromBase64({
          base64: source.textContent,
          name: `${source.dataset.name}.nii.gz`,
          colormap: source.dataset.colours,
          cal_min: 0,
          cal_max: 255,
        }),
      ),
    );
    const [base, overlay, opacity, slice, number] = [".base", ".overlay", ".opacity", ".slice", ".number"].map(find);
    const slices = Number(slice.max) + 1;

    const show = () => {
      const below = images[Number(base.value)];
      const above = overlay.value === "" || overlay.value === base.value ? null : images[Number(overlay.value)];
      below.opacity = 1;
      if (above) above.opacity = Number(opacity.value);
      nv.volumes = above ? [below, above] : [below];
      nv.setVolume(below, 0);
    };
    const move = () => {
      const position = [...nv.scene.crosshairPos];
      position[AXIAL] = (Number(slice.value) + 0.5) / slices;
      nv.scene.crosshairPos = position;
      nv.drawScene();
      tell();
    };
    const tell = () => {
      slice.value = Math.floor(nv.scene.crosshairPos[AXIAL] * slices);
      number.value = slice.value;
      viewer.dataset.slice = slice.value;
    };
    for (const choice of [base, overlay]) choice.addEventListener("change", show);
    opacity.addEventListener("input", show);
    slice.addEventListener("input", move);
    nv.onLocationChange = tell;
    show();
    nv.setSliceType(nv.sliceTypeMultiplanar);
    move();
    viewer.dataset.ready = "yes";
  };

  for (const viewer of document.querySelectorAll(".viewer")) {
    viewer.querySelector(".open").addEventListener("click", () => {
      open(viewer).catch((error) => {
        const problem = viewer.querySelector(".problem");
        problem.hidden = false;
        problem.textContent = `The viewer cannot start (${error.message}); it needs a browser with WebGL2.`;
        viewer.querySelector(".stage").hidden = true;
      });
    });
  }
})();
