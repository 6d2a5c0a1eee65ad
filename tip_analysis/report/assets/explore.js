/** The live map: cuts, shares, filters, the table, the permalink and the file of values together. */
tip.explore = (() => {
  const data = tip.data("explore-data");
  if (!data || !data.runs.length) { return null; }
  const { at, make, option } = tip;
  const tables = [], grids = [];
  const run = () => tables[state.run];
  const grid = () => grids[state.run];
  const AXES = ["entropy", "divergence"];
  const state = {
    run: 0, cuts: null, pinned: -1, sort: { column: "q3_score", down: true },
    filters: { quadrants: new Set([3]), kind: "", segment: "", planted_label: "", artefact: "", reward: "any", rule: null, text: "", box: null },
  };
  let found = [];

  const cuts = () => state.cuts ?? run().cuts;
  const load = (index) => {
    tables[index] ??= tip.tokens.make(data.runs[index], data);
    grids[index] ??= tip.grid.make(data.runs[index].grid);
  };

  /** Tokens and loss of each quadrant, and how exact they are. */
  const shares = () => {
    const [counts, loss] = tip.tokens.assign(run(), state.cuts);
    if (state.cuts === null) {
      const own = run().cuts ? tip.grid.under(grid(), ...run().cuts) : { loss };
      return { counts: run().counts, loss: own.loss, exact: true, spread: 0 };
    }
    if (run().complete) { return { counts, loss, exact: true, spread: 0 }; }
    return tip.grid.under(grid(), ...state.cuts);
  };

  const sum = (values) => values.reduce((total, value) => total + value, 0);
  const drawShares = () => {
    const now = shares(), all = sum(now.counts) || 1, loss = sum(now.loss) || 1, about = now.exact ? "" : "≈ ";
    for (const code of [1, 2, 3, 4]) {
      const share = now.counts[code - 1] / all;
      at(`x-share-${code}`).textContent = about + tip.percent(share);
      at(`x-bar-${code}`).style.width = tip.percent(share);
      at(`x-count-${code}`).textContent = about + tip.count(now.counts[code - 1]);
      at(`x-loss-${code}`).textContent = about + tip.percent(now.loss[code - 1] / loss);
      at(`x-corner-${code}`).textContent = `${tip.QUADRANTS[code]} ${about}${tip.percent(share)}`;
    }
    const words = state.cuts === null ? "At the report’s own cuts." : now.exact ? "Exact, over all tokens." : `Between two steps of the histogram: off by at most ${(100 * now.spread).toFixed(2)} points. The sliders stop at exact values.`;
    at("x-exact").textContent = words;
  };

  const drawCuts = () => {
    AXES.forEach((axis, index) => {
      const cut = cuts()?.[index], edges = grid()[axis], slider = at(`x-${axis}`), field = at(`x-${axis}-nats`);
      slider.max = edges.length - 1;
      const place = cut === undefined ? 0 : Math.min(edges.length - 1, tip.grid.place(edges, cut));
      if (Number(slider.value) !== place) { slider.value = place; }
      slider.setAttribute("aria-valuetext", cut === undefined ? "one for each batch" : `${tip.number(cut)} nats`);
      if (document.activeElement !== field) { field.value = cut === undefined ? "" : String(Number(cut.toPrecision(4))); }
    });
    at("x-reset").disabled = state.cuts === null;
  };

  const regionWords = () => {
    const { box } = state.filters;
    if (!box) { return ""; }
    const range = (low, high) => `${tip.number(low)} to ${tip.number(high)}`;
    return `Region: entropy ${range(box[0], box[1])}, reverse KL ${range(box[2], box[3])} nats; ${tip.count(tip.grid.inside(grid(), box))} tokens of the run.`;
  };
  const drawTable = () => {
    found = tip.tokens.find(run(), state.filters, state.sort);
    const left = list.fill(run(), found, state.run, state.sort, state.pinned);
    showRest(left);
    const carried = run().complete ? "" : ` of the ${tip.count(run().size)} in this page`;
    at("x-status").textContent = `${tip.count(found.length)} ${found.length === 1 ? "token fits" : "tokens fit"}${carried}.`;
    at("x-region").textContent = regionWords();
    at("x-clear").hidden = !state.filters.box;
  };
  const showRest = (left) => {
    at("x-more").hidden = left <= 0;
    at("x-more").textContent = `Show more (${tip.count(left)} left)`;
  };
  const draw = () => { drawShares(); drawCuts(); chart.cut(cuts()); drawTable(); };

  /** The state as parts of the address; what is at its default is left out. */
  const remember = () => {
    const { filters, sort } = state, encode = encodeURIComponent;
    const quadrants = [...filters.quadrants].sort().map((code) => `Q${code}`).join(",");
    tip.link.update({
      run: state.run ? String(state.run) : null,
      entropy: state.cuts ? String(state.cuts[0]) : null,
      divergence: state.cuts ? String(state.cuts[1]) : null,
      quadrant: quadrants === "Q3" ? null : quadrants || "none",
      kind: filters.kind ? encode(filters.kind) : null,
      segment: filters.segment ? encode(filters.segment) : null,
      planted: filters.planted_label ? encode(filters.planted_label) : null,
      artefact: filters.artefact ? encode(filters.artefact) : null,
      reward: filters.reward === "any" ? null : filters.reward,
      rule: filters.rule ? `${encode(run().rules[filters.rule[0]])}:${run().ratios[filters.rule[1] - 1]}` : null,
      text: filters.text ? encode(filters.text) : null,
      box: filters.box ? filters.box.join(",") : null,
      sort: sort.column === "q3_score" && sort.down ? null : `${sort.down ? "-" : ""}${sort.column}`,
    });
  };
  const changed = () => { state.pinned = -1; remember(); draw(); };
  const filtered = () => { state.pinned = -1; remember(); drawTable(); };

  const setCut = (index, value) => {
    if (!(value >= 0)) { return; }
    const now = [...(cuts() ?? [0, 0])];
    now[index] = value;
    const own = run().cuts;
    state.cuts = own && now[0] === own[0] && now[1] === own[1] ? null : now;
    changed();
  };

  const chart = tip.map.make(at("x-map"), at("x-canvas"), {
    hover: (box, frame) => {
      const hint = at("x-hint");
      hint.hidden = !box;
      if (!box) { return; }
      const number = tip.grid.inside(grid(), box), all = grid().countSums[0] || 1;
      const inside = tip.tokens.find(run(), { ...state.filters, kind: "", rule: null, text: "", reward: "any", segment: "", planted_label: "", artefact: "", quadrants: new Set([1, 2, 3, 4]), box }, {});
      const often = new Map();
      for (const i of inside) { const text = tip.tokens.textAt(run(), run().text[i]); often.set(text, (often.get(text) ?? 0) + 1); }
      const most = [...often].sort((a, b) => b[1] - a[1]).slice(0, 4).map(([text]) => `“${text}”`).join(" ");
      hint.replaceChildren(make("b", "", `${tip.count(number)} ${number === 1 ? "token" : "tokens"} (${tip.percent(number / all)})`), make("span", "", `entropy ${tip.number(box[0])} to ${tip.number(box[1])}`), make("span", "", `reverse KL ${tip.number(box[2])} to ${tip.number(box[3])}`), make("span", "x-often", most));
      hint.style.left = `${Math.min(frame[0] + frame[2] + 10, at("x-map").clientWidth - hint.offsetWidth - 4)}px`;
      hint.style.top = `${Math.max(4, frame[1] - 20)}px`;
    },
    pick: (box) => {
      state.filters.box = box;
      if (box) { state.filters.quadrants = new Set([1, 2, 3, 4]); drawChips(); }
      filtered();
    },
  });
  const list = tip.table.make(at("x-table"), {
    sort: (column) => {
      state.sort = { column, down: state.sort.column === column ? !state.sort.down : true };
      filtered();
    },
    opens: (rollout) => tip.browser?.has(state.run, rollout) ?? false,
  });

  const chips = [...document.querySelectorAll("#explorer .chip")];
  const drawChips = () => chips.forEach((chip) => chip.setAttribute("aria-pressed", String(state.filters.quadrants.has(Number(chip.dataset.quadrant)))));
  const fill = (id, entries, all) => {
    const select = at(id);
    select.replaceChildren();
    option(select, "", all);
    for (const [value, text] of entries) { option(select, value, text); }
    select.closest("label").hidden = entries.length === 0;
  };
  const NAMED = { kind: "any kind", segment: "any segment", planted_label: "any label", artefact: "any token" };
  const fillFilters = () => {
    for (const [name, all] of Object.entries(NAMED)) { fill(`x-${name}`, (run().names[name] ?? []).map((text) => [text, text.replaceAll("_", " ")]), all); }
    fill("x-rule", run().rules.flatMap((rule, index) => run().ratios.map((ratio, code) => [`${index}:${code + 1}`, `${rule} at ρ = ${ratio}`])), "any rule or none");
    at("x-rewards").hidden = run().rollouts.every(([, reward]) => reward === null);
  };
  const showFilters = () => {
    drawChips();
    for (const name of Object.keys(NAMED)) { at(`x-${name}`).value = state.filters[name]; }
    at("x-rule").value = state.filters.rule ? state.filters.rule.join(":") : "";
    at("x-reward").value = state.filters.reward;
    at("x-search").value = state.filters.text;
  };
  const choose = (index) => {
    load(index);
    Object.assign(state, { run: index, pinned: -1 });
    at("x-run").value = index;
    fillFilters();
    chart.show(grid());
    at("x-carried").textContent = data.runs[index].words;
  };

  const toFile = () => {
    const table = run(), scores = tip.table.COLUMNS.filter(([name]) => table.columns[name]).map(([name]) => name);
    const named = ["kind", "segment", "planted_label", "artefact"].filter((name) => table.names[name]);
    const header = ["run", "rollout_id", "position", "before", "token", "after", "quadrant", "reward", ...named, ...scores, "student_top", "teacher_top", "kept_by"];
    const { quoted } = tip.csv;
    const rows = found.map((i) => {
      const [name, reward] = table.rollouts[table.rollout[i]], [before, after] = tip.tokens.context(table, i);
      return [quoted(table.name), quoted(name), table.position[i], quoted(before), quoted(tip.tokens.textAt(table, table.text[i])), quoted(after), tip.QUADRANTS[table.now[i]], reward, ...named.map((column) => tip.tokens.nameOf(table, column, i)), ...scores.map((column) => table[column][i]), quoted(tip.tokens.textAt(table, table.student[i])), quoted(tip.tokens.textAt(table, table.teacher[i])), quoted(tip.tokens.keptBy(table, i).map(([rule, ratio]) => `${rule}:${ratio}`).join(" "))];
    });
    tip.csv.save("tokens.csv", tip.csv.write(header, rows));
    at("x-live").textContent = `${tip.count(found.length)} tokens are in the file.`;
  };
  const copyLink = async () => {
    const field = at("x-address");
    field.value = location.href; field.hidden = false; field.select();
    try { await navigator.clipboard.writeText(location.href); at("x-live").textContent = "The link is copied."; } catch { at("x-live").textContent = "Copy the selected address."; }
  };

  const numbers = (text, size) => { const values = (text ?? "").split(",").map(Number); return values.length === size && values.every((value) => value >= 0) ? values : null; };
  /** Take the state from the address: whatever it does not name goes to its default. */
  const follow = () => {
    const get = (key) => tip.link.get(key), text = (key) => tip.link.decode(get(key) ?? "") ?? "";
    const token = tip.link.token(get("token")), index = Number(get("run") ?? token?.run ?? 0);
    choose(data.runs[index] ? index : 0);
    state.cuts = numbers(`${get("entropy")},${get("divergence")}`, 2);
    const named = (get("quadrant") ?? "Q3").split(",").map((name) => tip.QUADRANTS.indexOf(name)).filter((code) => code > 0);
    if (!named.length && get("quadrant") !== "none") { named.push(3); }
    const known = (name, key) => (run().names[name]?.includes(text(key)) ? text(key) : "");
    const [rule, ratio] = (get("rule") ?? "").split(/:(?=[^:]*$)/);
    const place = [run().rules.indexOf(tip.link.decode(rule) ?? ""), run().ratios.indexOf(Number(ratio)) + 1];
    const reward = get("reward");
    state.filters = {
      quadrants: new Set(named), kind: known("kind", "kind"), segment: known("segment", "segment"),
      planted_label: known("planted_label", "planted"), artefact: known("artefact", "artefact"),
      reward: ["rewarded", "unrewarded", "ungraded"].includes(reward) ? reward : "any",
      rule: place[0] >= 0 && place[1] > 0 ? place : null, text: text("text").toLowerCase(), box: numbers((get("box") ?? "").replaceAll("Infinity", "1e999"), 4),
    };
    const order = get("sort") ?? "-q3_score", column = order.replace(/^-/, "");
    state.sort = run().columns[column] ? { column, down: order.startsWith("-") } : { column: "q3_score", down: true };
    state.pinned = token && token.run === state.run ? tip.tokens.indexOf(run(), token.rollout, token.position) : -1;
    showFilters();
    draw();
    chart.mark(state.filters.box);
    if (state.pinned >= 0 && !tip.browser?.has(token.run, token.rollout)) { at("x-list").scrollIntoView({ block: "start", behavior: "instant" }); }
  };

  AXES.forEach((axis, index) => {
    at(`x-${axis}`).addEventListener("input", (event) => setCut(index, grid()[axis][Number(event.target.value)]));
    at(`x-${axis}-nats`).addEventListener("input", (event) => { if (event.target.value !== "") { setCut(index, Number(event.target.value)); } });
    at(`x-${axis}-nats`).addEventListener("blur", drawCuts);
  });
  at("x-reset").addEventListener("click", () => { state.cuts = null; changed(); });
  for (const chip of chips) {
    chip.addEventListener("click", () => {
      const code = Number(chip.dataset.quadrant), { quadrants } = state.filters;
      if (quadrants.has(code)) { quadrants.delete(code); } else { quadrants.add(code); }
      drawChips(); filtered();
    });
  }
  for (const name of Object.keys(NAMED)) { at(`x-${name}`).addEventListener("change", (event) => { state.filters[name] = event.target.value; filtered(); }); }
  at("x-reward").addEventListener("change", (event) => { state.filters.reward = event.target.value; filtered(); });
  at("x-rule").addEventListener("change", (event) => { state.filters.rule = event.target.value ? event.target.value.split(":").map(Number) : null; filtered(); });
  at("x-search").addEventListener("input", (event) => { state.filters.text = event.target.value.toLowerCase(); filtered(); });
  at("x-run").addEventListener("change", (event) => { state.cuts = null; state.filters.box = null; choose(Number(event.target.value)); Object.assign(state.filters, { kind: "", segment: "", planted_label: "", artefact: "", rule: null }); showFilters(); changed(); });
  at("x-clear").addEventListener("click", () => { state.filters.box = null; chart.mark(null); filtered(); });
  at("x-more").addEventListener("click", () => showRest(list.more()));
  at("x-csv").addEventListener("click", toFile);
  at("x-link").addEventListener("click", copyLink);
  data.runs.forEach((item, index) => option(at("x-run"), index, item.name));
  at("x-pick").hidden = data.runs.length < 2;
  document.documentElement.classList.add("live");
  at("explorer").hidden = false;
  tip.link.listen(follow);
  return { follow };
})();
