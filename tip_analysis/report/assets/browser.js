/** The token browser: rollouts of a sample, to be read token by token. */
tip.browser = (() => {
  const data = tip.data("browser-data");
  if (!data) { return null; }
  const { at, make, option, percent, number: show } = tip;
  const root = at("token-browser");
  const tokensBox = at("b-tokens"), detail = at("b-detail"), live = at("b-live");
  const names = tip.QUADRANTS;
  const state = { run: 0, rollout: 0, token: 0, color: "quadrant", shown: new Set([0, 1, 2, 3, 4]), search: "", reward: "all" };
  let spans = [];

  const run = () => data.runs[state.run];
  const rollout = () => run().rollouts[state.rollout];
  const textOf = (index) => run().texts[index][0];
  const rewardKey = (item) => (item.reward === null || item.reward === undefined ? "ungraded" : String(Number(item.reward.toFixed(4))));
  const joined = (item) => (item.joined ??= item.t.map(textOf).join("").toLowerCase());
  const passes = (item) => (state.reward === "all" || rewardKey(item) === state.reward)
    && (!state.search || joined(item).includes(state.search));
  const visibleRollouts = () => run().rollouts.map((_, index) => index).filter((index) => passes(run().rollouts[index]));

  const fillChoices = () => {
    at("pick-run").hidden = data.runs.length < 2;
    data.runs.forEach((item, index) => option(at("b-run"), index, item.name));
    option(at("b-color"), "quadrant", "quadrant");
    for (const [key, name] of data.scores) { if (data.runs.some((item) => item.scales[key])) { option(at("b-color"), key, name); } }
  };
  const fillRewards = () => {
    const select = at("b-reward");
    select.replaceChildren();
    option(select, "all", "any reward");
    for (const key of [...new Set(run().rollouts.map(rewardKey))].sort()) { option(select, key, key === "ungraded" ? "no reward" : `reward ${key}`); }
    if (![...select.options].some((item) => item.value === state.reward)) { state.reward = "all"; }
    select.value = state.reward;
    select.disabled = select.options.length < 3;
  };
  const fillRollouts = () => {
    const select = at("b-rollout"), list = visibleRollouts();
    select.replaceChildren();
    for (const index of list) {
      const item = run().rollouts[index];
      const reward = rewardKey(item) === "ungraded" ? "" : ` · reward ${rewardKey(item)}`;
      option(select, index, `${item.shown}${reward} · ${item.n} tokens`);
    }
    const none = list.length === 0;
    if (none) { option(select, -1, "no rollout fits"); }
    for (const id of ["b-prev", "b-next", "b-weaker", "b-stronger", "b-rollout"]) { at(id).disabled = none; }
    if (!none && !list.includes(state.rollout)) { state.rollout = list[0]; state.token = 0; }
    select.value = none ? -1 : state.rollout;
    return !none;
  };

  const drawLegend = () => {
    const box = at("b-legend");
    box.replaceChildren();
    if (state.color === "quadrant") {
      const words = ["", "uncertain, disagreeing", "uncertain, agreeing", "confident, disagreeing", "confident, agreeing"];
      for (const code of [1, 2, 3, 4]) { box.append(make("span", `tag ${names[code]}`, `${names[code]} ${words[code]}`)); }
      return;
    }
    const [, name, unit] = data.scores.find(([key]) => key === state.color);
    const scale = run().scales[state.color];
    box.append(make("span", "", name));
    if (!scale) { box.append(make("span", "", "not measured in this run")); return; }
    box.append(make("span", "", show(scale[0])), make("span", "ramp"), make("span", "", `${show(scale[1])} ${unit}`));
  };
  const paint = () => {
    const item = rollout();
    const byScore = state.color !== "quadrant";
    const scale = byScore ? run().scales[state.color] : null;
    const found = searchHits(item);
    spans.forEach((span, index) => {
      const dim = !state.shown.has(item.q[index]);
      span.className = `tok ${byScore ? (item.q[index] === 0 ? "q0" : "") : `q${item.q[index]}`}${dim ? " dim" : ""}${found.has(index) ? " found" : ""}`;
      span.style.backgroundColor = "";
      if (scale && !dim && item.s[state.color]) {
        const value = item.s[state.color][index];
        if (value === null) { return; }
        const high = value === "∞" ? 1 : value === "−∞" ? 0 : (value - scale[0]) / ((scale[1] - scale[0]) || 1);
        span.style.backgroundColor = `rgb(var(--scale-rgb) / ${(0.04 + 0.58 * Math.min(1, Math.max(0, high))).toFixed(3)})`;
      }
    });
    drawLegend();
  };
  const searchHits = (item) => {
    const hits = new Set();
    if (!state.search) { return hits; }
    const starts = [];
    let length = 0;
    for (const index of item.t) { starts.push(length); length += textOf(index).toLowerCase().length; }
    const text = joined(item);
    for (let from = text.indexOf(state.search); from >= 0; from = text.indexOf(state.search, from + 1)) {
      for (let k = 0; k < starts.length; k += 1) {
        const end = k + 1 < starts.length ? starts[k + 1] : length;
        if (starts[k] < from + state.search.length && end > from) { hits.add(k); }
      }
    }
    return hits;
  };
  const draw = () => {
    spans = [];
    tokensBox.replaceChildren();
    if (!fillRollouts()) {
      detail.replaceChildren(make("p", "where", "No rollout fits the filters."));
      at("b-about").textContent = "Prompt"; at("b-prompt").textContent = "";
      return;
    }
    const item = rollout(), pieces = document.createDocumentFragment();
    const rightToLeft = item.t.filter((index) => /[\p{Script=Hebrew}\p{Script=Arabic}\p{Script=Syriac}\p{Script=Thaana}]/u.test(textOf(index))).length;
    tokensBox.classList.toggle("natural", rightToLeft > 0.3 * item.t.length);
    item.t.forEach((index, place) => {
      const span = make("span", "tok", textOf(index));
      span.setAttribute("role", "option");
      span.setAttribute("aria-selected", "false");
      span.tabIndex = -1;
      span.dataset.place = place;
      spans.push(span);
      pieces.append(span);
      if (run().texts[index][2]) { pieces.append("\n".repeat(Math.min(3, run().texts[index][2]))); }
    });
    if (item.n > item.t.length) { pieces.append(make("span", "q0", ` … ${item.n - item.t.length} more tokens are not in this page`)); }
    tokensBox.append(pieces);
    const facts = [item.answer && `answer ${item.answer}`, rewardKey(item) !== "ungraded" && `reward ${rewardKey(item)}`, item.finish && `ended by ${item.finish}`];
    at("b-about").textContent = ["Prompt", ...facts.filter(Boolean)].join(" · ");
    at("b-prompt").textContent = item.prompt || "(not recorded)";
    state.token = Math.min(state.token, Math.max(0, spans.length - 1));
    paint();
    select(state.token, { focus: false, remember: false });
  };

  const bars = (title, tokens, probabilities, sampled) => {
    const box = document.createDocumentFragment();
    box.append(make("h4", "", title));
    const list = make("ol", "bars");
    tokens.forEach((index, rank) => {
      const line = make("li"), text = make("span", `text${index === sampled ? " sampled" : ""}`, textOf(index).replaceAll(" ", "␣"));
      text.dir = "auto"; text.title = text.textContent;
      const bar = make("span", "bar"), fill = make("i");
      fill.style.width = percent(probabilities[rank]);
      bar.append(fill);
      line.append(text, bar, make("span", "value", percent(probabilities[rank])));
      list.append(line);
    });
    box.append(list);
    return box;
  };
  const describe = (place) => {
    const item = rollout();
    const box = document.createDocumentFragment();
    const head = make("p", "token-text", textOf(item.t[place]).replaceAll(" ", "␣"));
    head.dir = "auto";
    box.append(head);
    const where = make("p", "where");
    if (item.q[place]) { where.append(make("span", `tag ${names[item.q[place]]}`, names[item.q[place]]), " "); }
    where.append(`position ${item.p[place]} · id ${run().texts[item.t[place]][1]}`);
    if (item.l && item.l[place] && item.l[place] !== "plain") { where.append(` · ${item.l[place].replace("_", " ")}`); }
    box.append(where);
    if (item.q[place] === 0) { box.append(make("p", "where", "The student did not write this token: it has no statistics.")); return box; }
    const facts = make("dl");
    for (const [key, name, unit] of data.scores) {
      if (item.s[key]) { facts.append(make("dt", "", name), make("dd", "", `${show(item.s[key][place])}${unit ? ` ${unit}` : ""}`)); }
    }
    box.append(facts, bars("student’s top tokens", item.a[place], item.ap[place], item.t[place]), bars("teacher’s top tokens", item.b[place], item.bp[place], item.t[place]));
    const chosen = Object.entries(item.r).filter(([, ratios]) => ratios[place]);
    box.append(make("h4", "", "selected by (from ρ)"));
    if (!chosen.length) { box.append(make("p", "where", run().rules.length ? "no rule shown here" : "no rule was run")); }
    const list = make("ul", "rules");
    for (const [rule, ratios] of chosen) { const line = make("li"); line.append(make("span", "", rule), make("span", "", show(ratios[place]))); list.append(line); }
    if (chosen.length) { box.append(list); }
    const link = make("a", "", "link to this token");
    link.href = `#token=${valueOf(place)}`;
    const last = make("p", "where"); last.append(link);
    box.append(last);
    return box;
  };
  const valueOf = (place) => tip.link.tokenValue(state.run, rollout().id, rollout().p[place]);
  const select = (place, { focus = true, remember = true } = {}) => {
    if (!spans.length) { detail.replaceChildren(make("p", "where", "This rollout has no token.")); return; }
    const before = spans[state.token];
    if (before) { before.setAttribute("aria-selected", "false"); before.tabIndex = -1; }
    state.token = Math.max(0, Math.min(place, spans.length - 1));
    const span = spans[state.token];
    span.setAttribute("aria-selected", "true");
    span.tabIndex = 0;
    if (focus) { span.focus({ preventScroll: true }); span.scrollIntoView({ block: "nearest" }); }
    detail.replaceChildren(describe(state.token));
    if (remember) { tip.link.update({ token: valueOf(state.token) }); }
  };
  const openRollout = (index, place = 0, options = {}) => { state.rollout = index; state.token = place; draw(); select(state.token, options); };
  const step = (by) => {
    const list = visibleRollouts();
    if (!list.length) { return; }
    openRollout(list[(list.indexOf(state.rollout) + by + list.length) % list.length], 0, { focus: document.activeElement?.closest("#b-tokens") !== null });
  };
  const strongTokens = () => visibleRollouts().flatMap((index) => {
    const item = run().rollouts[index];
    return item.q.flatMap((code, place) => {
      const score = item.s.q3_score?.[place];
      return code === 3 && (score === "∞" || score >= run().strong) ? [[index, place]] : [];
    });
  });
  const jump = (by) => {
    const all = strongTokens();
    if (!all.length) { live.textContent = "No strong Q3 token in these rollouts."; return; }
    const order = new Map(visibleRollouts().map((index, rank) => [index, rank]));
    const here = [order.get(state.rollout), state.token];
    const isAfter = ([index, place]) => order.get(index) > here[0] || (index === state.rollout && place > here[1]);
    const isBefore = ([index, place]) => order.get(index) < here[0] || (index === state.rollout && place < here[1]);
    const next = by > 0 ? (all.find(isAfter) ?? all[0]) : ([...all].reverse().find(isBefore) ?? all[all.length - 1]);
    if (next[0] === state.rollout) { select(next[1]); } else { openRollout(next[0], next[1]); }
    live.textContent = `Strong Q3 token ${all.findIndex(([i, p]) => i === next[0] && p === next[1]) + 1} of ${all.length}: ${textOf(rollout().t[next[1]])}`;
  };
  /** Where the searched text begins: rollout and token, over all rollouts that fit. */
  const hits = () => (state.search ? visibleRollouts().flatMap((index) => {
    const item = run().rollouts[index], marked = [...searchHits(item)].sort((a, b) => a - b);
    return marked.filter((place, k) => place !== marked[k - 1] + 1).map((place) => [index, place]);
  }) : []);
  const jumpToHit = (by) => {
    const all = hits(), status = at("b-hits");
    if (!all.length) { status.textContent = state.search ? "no hit" : ""; return; }
    const rank = new Map(visibleRollouts().map((index, place) => [index, place]));
    const order = ([index, place]) => rank.get(index) * 1e6 + place, here = order([state.rollout, state.token]);
    const next = by > 0 ? all.findIndex((hit) => order(hit) > here) : all.findLastIndex((hit) => order(hit) < here);
    const chosen = next >= 0 ? next : by > 0 ? 0 : all.length - 1;
    const [index, place] = all[chosen];
    if (index === state.rollout) { select(place, { focus: false }); } else { openRollout(index, place, { focus: false }); }
    spans[place].scrollIntoView({ block: "nearest" });
    status.textContent = `hit ${chosen + 1} of ${all.length}`;
  };
  const placeOf = (number, id) => data.runs[number]?.rollouts.findIndex((item) => item.id === id) ?? -1;
  const follow = () => {
    const token = tip.link.token(tip.link.get("token"));
    if (!token || !data.runs[token.run]) { return; }
    const index = placeOf(token.run, token.rollout);
    if (index < 0) { live.textContent = "That rollout is not among those that can be read here."; return; }
    Object.assign(state, { run: token.run, reward: "all", search: "" });
    at("b-run").value = state.run; at("b-search").value = "";
    fillRewards();
    const place = data.runs[state.run].rollouts[index].p.indexOf(token.position);
    openRollout(index, Math.max(0, place), { focus: true, remember: false });
    (matchMedia("(max-width: 859px)").matches ? at("b-about") : root).scrollIntoView({ block: "start", behavior: "instant" });
  };

  tokensBox.addEventListener("click", (event) => { const span = event.target.closest(".tok"); if (span) { select(Number(span.dataset.place)); } });
  tokensBox.addEventListener("pointerover", (event) => {
    const span = event.target.closest(".tok");
    if (span && event.pointerType === "mouse") { detail.replaceChildren(describe(Number(span.dataset.place))); }
  });
  tokensBox.addEventListener("pointerleave", (event) => { if (spans.length && event.pointerType === "mouse") { detail.replaceChildren(describe(state.token)); } });
  tokensBox.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) { return; }
    const actions = {
      ArrowRight: () => select(state.token + 1), ArrowLeft: () => select(state.token - 1),
      ArrowDown: () => select(state.token + 10), ArrowUp: () => select(state.token - 10),
      Home: () => select(0), End: () => select(spans.length - 1),
      n: () => jump(1), p: () => jump(-1), "]": () => step(1), "[": () => step(-1),
    };
    if (actions[event.key]) { event.preventDefault(); actions[event.key](); }
  });
  at("b-run").addEventListener("change", (event) => {
    const { id } = rollout() ?? {}, number = Number(event.target.value), same = placeOf(number, id);
    Object.assign(state, { run: number, rollout: Math.max(0, same), token: same < 0 ? 0 : state.token });
    fillRewards();
    draw();
  });
  at("b-rollout").addEventListener("change", (event) => openRollout(Number(event.target.value), 0, { focus: false }));
  at("b-reward").addEventListener("change", (event) => { state.reward = event.target.value; draw(); });
  at("b-color").addEventListener("change", (event) => { state.color = event.target.value; if (spans.length) { paint(); } });
  at("b-search").addEventListener("input", (event) => {
    state.search = event.target.value.toLowerCase();
    draw();
    const all = hits();
    at("b-hits").textContent = state.search ? (all.length === 1 ? "1 hit" : `${all.length} hits`) : "";
    if (all.length && !(all[0][0] === state.rollout && all[0][1] === state.token)) { state.token = 0; if (all[0][0] !== state.rollout) { openRollout(all[0][0], all[0][1], { focus: false }); } else { select(all[0][1], { focus: false }); } spans[state.token]?.scrollIntoView({ block: "nearest" }); }
  });
  at("b-search").addEventListener("keydown", (event) => {
    if (event.key === "Enter") { event.preventDefault(); jumpToHit(event.shiftKey ? -1 : 1); }
    if (event.key === "Escape" && state.search) { event.preventDefault(); event.target.value = ""; state.search = ""; at("b-hits").textContent = ""; draw(); select(state.token); }
  });
  at("b-prev").addEventListener("click", () => step(-1));
  at("b-next").addEventListener("click", () => step(1));
  at("b-stronger").addEventListener("click", () => jump(1));
  at("b-weaker").addEventListener("click", () => jump(-1));
  for (const chip of root.querySelectorAll(".chip")) {
    chip.addEventListener("click", () => {
      const code = Number(chip.dataset.quadrant), on = !state.shown.has(code);
      if (on) { state.shown.add(code); } else { state.shown.delete(code); }
      chip.setAttribute("aria-pressed", String(on));
      if (spans.length) { paint(); }
    });
  }
  root.hidden = false;
  fillChoices();
  fillRewards();
  if (run().rollouts.length) { draw(); } else { detail.replaceChildren(make("p", "where", "No rollout has tokens.")); fillRollouts(); }
  tip.link.listen(follow);
  return { has: (number, id) => placeOf(number, id) >= 0 };
})();
