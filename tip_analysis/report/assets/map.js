/**
 * The quadrant map on a canvas: density of all tokens on logarithmic axes, both cuts, the cell under
 * the pointer and the region that was drawn. Cells lie between edges of the joint histogram, so
 * their counts are exact.
 */
tip.map = (() => {
  const MARGIN = { left: 58, right: 12, top: 12, bottom: 44 };
  const NUM_CELLS = 56;

  /** Some of the edges, about evenly apart in logarithms, from the lowest that matters. */
  const displayEdges = (edges, share) => {
    const positive = edges.filter((edge) => edge > 0);
    const low = positive.find((edge) => share(edge) > 0.004) ?? positive[0];
    const high = positive[positive.length - 1];
    const step = Math.log(high / low) / NUM_CELLS, chosen = [low];
    for (const edge of positive) {
      if (Math.log(edge / chosen[chosen.length - 1]) >= step * 0.999 && edge > low) { chosen.push(edge); }
    }
    if (chosen[chosen.length - 1] !== high) { chosen.push(high); }
    return chosen;
  };

  /** Counts per display cell; what lies below the first edge is in the first cell, +∞ in the last. */
  const bin = (grid) => {
    const all = grid.countSums[0] || 1, width = grid.columns + 1;
    const under = (axis) => (edge) => {
      const k = tip.grid.place(grid[axis], edge, true);
      return 1 - (axis === "entropy" ? grid.countSums[k * width] : grid.countSums[k]) / all;
    };
    const x = displayEdges(grid.entropy, under("entropy")), y = displayEdges(grid.divergence, under("divergence"));
    const column = (edges, display) => Array.from({ length: edges.length + 2 }, (_, cell) => {
      const right = cell < edges.length ? edges[cell] : Infinity;
      return Math.min(display.length - 2, Math.max(0, tip.grid.place(display, right) - 1));
    });
    const ofX = column(grid.entropy, x), ofY = column(grid.divergence, y);
    const counts = new Float64Array((x.length - 1) * (y.length - 1));
    grid.cells.forEach((cell, k) => {
      const i = ofX[Math.floor(cell / grid.columns)], j = ofY[cell % grid.columns];
      counts[i * (y.length - 1) + j] += grid.counts[k];
    });
    return { x, y, counts };
  };

  /**
   * @param {HTMLElement} box holds the canvas; takes the focus
   * @param {HTMLCanvasElement} canvas
   * @param {{hover: Function, pick: Function}} on `hover(cell, point)` with a cell or null;
   *   `pick(region)` with [left, right, low, high] in nats, or null
   */
  const make = (box, canvas, on) => {
    const view = { bins: null, cuts: null, cursor: null, anchor: null, region: null, width: 0, height: 0 };
    const pen = canvas.getContext("2d");
    const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

    const span = (edges) => [Math.log(edges[0]), Math.log(edges[edges.length - 1])];
    const across = (value) => {
      const [low, high] = span(view.bins.x), inner = view.width - MARGIN.left - MARGIN.right;
      const at = (Math.log(Math.max(value, 1e-12)) - low) / (high - low);
      return MARGIN.left + inner * Math.min(1, Math.max(0, at));
    };
    const down = (value) => {
      const [low, high] = span(view.bins.y), inner = view.height - MARGIN.top - MARGIN.bottom;
      const at = (Math.log(Math.max(value, 1e-12)) - low) / (high - low);
      return MARGIN.top + inner * (1 - Math.min(1, Math.max(0, at)));
    };

    const drawCells = () => {
      const { x, y, counts } = view.bins, rows = y.length - 1;
      const area = (i, j) => Math.log(x[i + 1] / x[i]) * Math.log(y[j + 1] / y[j]);
      let most = 0;
      for (let c = 0; c < counts.length; c += 1) { if (counts[c]) { most = Math.max(most, counts[c] / area(Math.floor(c / rows), c % rows)); } }
      const unit = most > 0 ? Math.log1p(most) : 1;
      const [h, d] = view.cuts ?? [Infinity, Infinity], cutX = across(h), cutY = down(d);
      const right = view.width - MARGIN.right, bottom = view.height - MARGIN.bottom;
      const regions = view.cuts
        ? [[cutX, MARGIN.top, right, cutY, "--q1"], [cutX, cutY, right, bottom, "--q2"],
          [MARGIN.left, MARGIN.top, cutX, cutY, "--q3"], [MARGIN.left, cutY, cutX, bottom, "--q4"]]
        : [[MARGIN.left, MARGIN.top, right, bottom, "--soft"]];
      for (const [x0, y0, x1, y1, name] of regions) {
        pen.fillStyle = color(name);
        for (let c = 0; c < counts.length; c += 1) {
          if (!counts[c]) { continue; }
          const i = Math.floor(c / rows), j = c % rows;
          const left = Math.max(x0, across(x[i])), end = Math.min(x1, across(x[i + 1]));
          const top = Math.max(y0, down(y[j + 1])), low = Math.min(y1, down(y[j]));
          if (end <= left || low <= top) { continue; }
          pen.globalAlpha = 0.22 + 0.78 * (Math.log1p(counts[c] / area(i, j)) / unit);
          pen.fillRect(left, top, Math.max(1, end - left - 0.5), Math.max(1, low - top - 0.5));
        }
      }
      pen.globalAlpha = 1;
    };

    const decades = (edges) => {
      const ticks = [];
      for (let power = -6; power <= 2; power += 1) { const value = 10 ** power; if (value >= edges[0] && value <= edges[edges.length - 1]) { ticks.push(Number(value.toPrecision(1))); } }
      return ticks;
    };
    const drawAxes = () => {
      const right = view.width - MARGIN.right, bottom = view.height - MARGIN.bottom;
      pen.strokeStyle = color("--faint"); pen.lineWidth = 1;
      pen.strokeRect(MARGIN.left + 0.5, MARGIN.top + 0.5, right - MARGIN.left, bottom - MARGIN.top);
      pen.fillStyle = color("--soft");
      pen.font = `12px ${getComputedStyle(document.body).fontFamily}`;
      pen.textAlign = "center"; pen.textBaseline = "top";
      for (const tick of decades(view.bins.x)) { pen.fillRect(across(tick), bottom, 1, 4); pen.fillText(String(tick), across(tick), bottom + 8); }
      pen.fillText("student entropy, nats", (MARGIN.left + right) / 2, bottom + 26);
      pen.textAlign = "right"; pen.textBaseline = "middle";
      for (const tick of decades(view.bins.y)) { pen.fillRect(MARGIN.left - 4, down(tick), 4, 1); pen.fillText(String(tick), MARGIN.left - 8, down(tick)); }
      pen.save(); pen.translate(12, (MARGIN.top + bottom) / 2); pen.rotate(-Math.PI / 2);
      pen.textAlign = "center"; pen.fillText("reverse KL, nats", 0, 0); pen.restore();
    };
    const drawLines = () => {
      if (!view.cuts) { return; }
      pen.strokeStyle = color("--ink"); pen.lineWidth = 1.5; pen.beginPath();
      const x = across(view.cuts[0]), y = down(view.cuts[1]);
      pen.moveTo(x, MARGIN.top); pen.lineTo(x, view.height - MARGIN.bottom);
      pen.moveTo(MARGIN.left, y); pen.lineTo(view.width - MARGIN.right, y); pen.stroke();
    };
    const frame = ([i0, i1, j0, j1]) => {
      const { x, y } = view.bins;
      return [across(x[i0]), down(y[j1 + 1]), across(x[i1 + 1]) - across(x[i0]), down(y[j0]) - down(y[j1 + 1])];
    };
    const drawMarks = () => {
      pen.strokeStyle = color("--focus");
      if (view.region) { pen.lineWidth = 2; pen.setLineDash([5, 3]); pen.strokeRect(...frame(view.region)); pen.setLineDash([]); }
      if (view.cursor) { const [i, j] = view.cursor; pen.lineWidth = 2; pen.strokeRect(...frame([i, i, j, j])); }
    };
    const draw = () => {
      if (!view.bins || !view.width) { return; }
      const scale = window.devicePixelRatio || 1;
      canvas.width = Math.round(view.width * scale); canvas.height = Math.round(view.height * scale);
      pen.setTransform(scale, 0, 0, scale, 0, 0);
      pen.clearRect(0, 0, view.width, view.height);
      drawCells(); drawAxes(); drawLines(); drawMarks();
    };
    const resize = () => {
      const { width } = box.getBoundingClientRect();
      view.width = Math.floor(width); view.height = Math.floor(Math.min(470, Math.max(300, width * 0.72)));
      canvas.style.height = `${view.height}px`;
      draw();
    };

    /** The cell [i, j] at a point of the canvas, kept inside the map. */
    const cellAt = (px, py) => {
      const { x, y } = view.bins;
      const last = (edges) => edges.length - 2;
      let i = 0, j = 0;
      while (i < last(x) && across(x[i + 1]) < px) { i += 1; }
      while (j < last(y) && down(y[j + 1]) > py) { j += 1; }
      return [i, j];
    };
    /** A cell's or a region's ends in nats; the first cells reach to 0, the last of the divergence to +∞. */
    const ends = ([i0, i1, j0, j1]) => {
      const { x, y } = view.bins;
      return [i0 === 0 ? 0 : x[i0], i1 === x.length - 2 ? Infinity : x[i1 + 1], j0 === 0 ? 0 : y[j0], j1 === y.length - 2 ? Infinity : y[j1 + 1]];
    };
    const spanOf = (a, b) => [Math.min(a[0], b[0]), Math.max(a[0], b[0]), Math.min(a[1], b[1]), Math.max(a[1], b[1])];
    const hover = () => {
      const cell = view.cursor;
      on.hover(cell && ends([cell[0], cell[0], cell[1], cell[1]]), cell && frame([cell[0], cell[0], cell[1], cell[1]]));
    };
    const pick = (region) => { view.region = region; draw(); on.pick(region && ends(region)); };

    const point = (event) => { const place = canvas.getBoundingClientRect(); return [event.clientX - place.left, event.clientY - place.top]; };
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || !view.bins) { return; }
      view.anchor = cellAt(...point(event)); canvas.setPointerCapture(event.pointerId);
      view.cursor = view.anchor; view.region = spanOf(view.anchor, view.anchor); draw();
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!view.bins) { return; }
      const cell = cellAt(...point(event));
      if (view.anchor && view.anchor.length) { view.region = spanOf(view.anchor, cell); }
      if (String(cell) !== String(view.cursor)) { view.cursor = cell; draw(); hover(); }
    });
    canvas.addEventListener("pointerup", (event) => {
      if (!view.anchor) { return; }
      const region = spanOf(view.anchor, cellAt(...point(event)));
      view.anchor = null; pick(region);
    });
    canvas.addEventListener("pointercancel", () => { view.anchor = null; });
    canvas.addEventListener("pointerleave", () => { if (!view.anchor) { view.cursor = null; draw(); hover(); } });
    box.addEventListener("blur", () => { view.cursor = null; view.anchor = null; draw(); hover(); });
    box.addEventListener("keydown", (event) => {
      const steps = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
      if (event.ctrlKey || event.metaKey || event.altKey || !view.bins) { return; }
      const { x, y } = view.bins, step = steps[event.key];
      if (step) {
        const from = view.cursor ?? cellAt(across(view.cuts?.[0] ?? x[0]), down(view.cuts?.[1] ?? y[0]));
        if (event.shiftKey) { view.anchor ??= from; } else { view.anchor = null; }
        view.cursor = [Math.min(x.length - 2, Math.max(0, from[0] + step[0])), Math.min(y.length - 2, Math.max(0, from[1] + step[1]))];
        if (view.anchor) { view.region = spanOf(view.anchor, view.cursor); }
        draw(); hover();
      } else if (event.key === "Enter" && view.cursor) {
        pick(view.anchor ? spanOf(view.anchor, view.cursor) : spanOf(view.cursor, view.cursor)); view.anchor = null;
      } else if (event.key === "Escape") { view.anchor = null; pick(null); } else { return; }
      event.preventDefault();
    });
    new ResizeObserver(resize).observe(box);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
    new MutationObserver(draw).observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });

    /** The region, in display cells, that holds ends given in nats. */
    const cellsOf = ([left, right, low, high]) => {
      const { x, y } = view.bins;
      const first = (edges, value) => (value === 0 ? 0 : Math.max(0, tip.grid.place(edges, value)));
      const last = (edges, value) => (value === Infinity ? edges.length - 2 : Math.max(0, tip.grid.place(edges, value) - 1));
      return [first(x, left), last(x, right), first(y, low), last(y, high)];
    };
    return {
      show: (grid) => { view.bins = bin(grid); view.region = null; view.cursor = null; resize(); },
      cut: (cuts) => { view.cuts = cuts; draw(); },
      mark: (region) => { view.region = region && view.bins ? cellsOf(region) : null; draw(); },
    };
  };
  return { make };
})();
