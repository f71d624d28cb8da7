// What the page's own script does: NiiVue canvases for a scene that the server described, and one crosshair for all of them.
"use strict";

const binaryformer = (() => {
  const views = [];
  let centre = null;
  let shown = 0;

  function add(holder) {
    const panel = document.createElement("figure");
    const title = document.createElement("figcaption");
    const canvas = document.createElement("canvas");
    // The viewer resizes its canvas to the element around it, which therefore has a size of its own.
    const frame = document.createElement("div");
    frame.append(canvas);
    panel.append(title, frame);
    holder.append(panel);
    const viewer = new niivue.Niivue({
      backColor: [0, 0, 0, 1],
      crosshairColor: [1, 0.62, 0.11, 0.8],
      crosshairWidth: 0.7,
      crosshairWidthUnit: "mm",
      dragAndDropEnabled: false,
      isColorbar: false,
      loadingText: "",
      logLevel: "error",
      show3Dcrosshair: false,
      sagittalNoseLeft: false,
    });
    const view = { panel, title, viewer, ready: viewer.attachToCanvas(canvas), names: {} };
    viewer.onLocationChange = (place) => { moved(view, place); };
    return view;
  }

  function moved(view, place) {
    centre = Array.from(place.mm).slice(0, 3);
    const label = place.values.length > 1 ? view.names[Math.round(place.values[1].value)] : "";
    const mm = centre.map((x) => x.toFixed(0)).join(", ");
    document.getElementById("bf-place").textContent = `(${mm}) mm${label ? `: ${label}` : ""}`;
  }

  async function draw(view, panel, opacity) {
    const viewer = await view.ready;
    viewer.setDrawingEnabled(false);
    if (viewer.drawBitmap) viewer.closeDrawing();
    view.title.textContent = panel.title;
    view.names = {};
    await viewer.loadVolumes(panel.volumes.map(({ labels, ...options }) => options));
    panel.volumes.forEach(({ labels }, place) => {
      if (labels) {
        viewer.volumes[place].setColormapLabel(labels);
        labels.I.forEach((number, index) => { view.names[number] = labels.labels[index]; });
        viewer.volumes[place].opacity = opacity;
      }
    });
    view.hasLabels = panel.volumes.map(({ labels }) => Boolean(labels));
    viewer.opts.multiplanarShowRender = panel.render ? niivue.SHOW_RENDER.ALWAYS : niivue.SHOW_RENDER.NEVER;
    viewer.setMultiplanarLayout(panel.render ? niivue.MULTIPLANAR_TYPE.GRID : niivue.MULTIPLANAR_TYPE.AUTO);
    viewer.setSliceType(niivue.SLICE_TYPE.MULTIPLANAR);
    viewer.updateGLVolume();
  }

  async function show(scene, opacity) {
    if (!scene) return;
    const holder = document.getElementById("bf-viewer");
    const turn = (shown += 1);
    holder.dataset.shown = "";
    holder.dataset.turn = String(turn);
    holder.style.setProperty("--panels", scene.panels.length);
    while (views.length < scene.panels.length) views.push(add(holder));
    views.forEach((view, place) => { view.panel.hidden = place >= scene.panels.length; });
    const inUse = views.slice(0, scene.panels.length);
    try {
      for (const [place, panel] of scene.panels.entries()) await draw(inUse[place], panel, opacity);
    } catch (error) {
      document.getElementById("bf-place").textContent = `the viewer cannot show this: ${error.message ?? error}`;
      throw error;
    }
    const viewers = inUse.map((view) => view.viewer);
    viewers.forEach((one) => { one.broadcastTo(viewers.filter((other) => other !== one), { "2d": true, "3d": true }); });
    const at = viewers[0].frac2mm(viewers[0].scene.crosshairPos, 0, true);
    centre = Array.from(at).slice(0, 3);
    // Whoever waits for the picture finds here the number of the scene, and how many of its panels are drawn.
    if (turn === shown) holder.dataset.shown = String(scene.panels.length);
  }

  function opacity(value) {
    views.filter((view) => !view.panel.hidden).forEach((view) => {
      (view.hasLabels ?? []).forEach((labels, place) => {
        if (labels && view.viewer.volumes[place]) view.viewer.setOpacity(place, value);
      });
    });
  }

  // A pen that fills what its line encloses, and removes where it starts with the eraser; until the next scene.
  function pen(value) {
    const viewer = views[0]?.viewer;
    if (!viewer?.volumes.length) return;
    if (!viewer.drawBitmap) viewer.createEmptyDrawing();
    viewer.setDrawingEnabled(true);
    viewer.setPenValue(value, true);
  }

  // The drawing as .nii.gz in base64, on the scan's own grid; null if there is none.
  async function drawing() {
    const viewer = views[0]?.viewer;
    if (!viewer?.drawBitmap) return null;
    const bytes = await viewer.saveImage({ filename: "", isSaveDrawing: true });
    const packed = new Blob([bytes]).stream().pipeThrough(new CompressionStream("gzip"));
    const letters = new Uint8Array(await new Response(packed).arrayBuffer());
    return btoa(letters.reduce((text, letter) => text + String.fromCharCode(letter), ""));
  }

  return { show, opacity, pen, drawing, position: () => centre, viewers: () => views.map((view) => view.viewer) };
})();
