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
    const [width, level, widthTold, levelTold] = [".window", ".level", ".window-told", ".level-told"].map(find);
    const slices = Number(slice.max) + 1;

    const show = () => {
      const below = images[Number(base.value)];
      const above = overlay.value === "" || overlay.value === base.value ? null : images[Number(overlay.value)];
      below.opacity = 1;
      if (above) above.opacity = Number(opacity.value);
      nv.volumes = above ? [below, above] : [below];
      nv.setVolume(below, 0);
      readWindow();
    };
    // In units of the image, as its histogram shows them; the viewer's own are 0 to 255.
    const tellWindow = () => {
      const unit = Number(sources[Number(base.value)].dataset.largest) / 255;
      widthTold.value = (Number(width.value) * unit).toFixed(2);
      levelTold.value = (Number(level.value) * unit).toFixed(2);
      viewer.dataset.window = `${widthTold.value} ${levelTold.value}`;
    };
    const applyWindow = () => {
      const image = images[Number(base.value)];
      image.cal_min = Number(level.value) - Number(width.value) / 2;
      image.cal_max = Number(level.value) + Number(width.value) / 2;
      nv.updateGLVolume();
      tellWindow();
    };
    const readWindow = () => {
      const { cal_min: low, cal_max: high } = images[Number(base.value)];
      [width.value, level.value] = [high - low, (low + high) / 2];
      tellWindow();
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
      viewer.dataset.cross = [...nv.frac2mm(nv.scene.crosshairPos)].slice(0, 3).map(Math.round).join(" ");
    };
    for (const choice of [base, overlay]) choice.addEventListener("change", show);
    opacity.addEventListener("input", show);
    slice.addEventListener("input", move);
    for (const input of [width, level]) input.addEventListener("input", applyWindow);
    find(".reset").addEventListener("click", () => {
      [width.value, level.value] = [255, 127.5];
      applyWindow();
    });
    nv.onLocationChange = tell;
    nv.onIntensityChange = readWindow;
    show();
    nv.setSliceType(nv.sliceTypeMultiplanar);
    nv.scene.crosshairPos = nv.mm2frac(JSON.parse(viewer.dataset.centre));
    nv.drawScene();
    tell();
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
