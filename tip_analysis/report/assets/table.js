/** The list of tokens below the map: one line each, in its context, sorted by its headers. */
tip.table = (() => {
  const STEP = 30;
  const COLUMNS = [
    ["q3_score", "Q3 score", "nats"], ["student_entropy", "entropy", "nats"], ["reverse_kl", "reverse KL", "nats"],
    ["forward_kl", "forward KL", "nats"], ["soft_or", "Soft-OR", ""], ["student_top1_prob", "top-1", ""],
    ["grad_norm", "‖g‖", ""], ["grad_dot_loss", "φ", ""],
  ];

  /** The score columns that a run has and that a table has room for. */
  const columnsOf = (table) => COLUMNS.filter(([name]) => table.columns[name]);

  const spaced = (text) => text.replaceAll(" ", "␣");

  const textCell = (table, i) => {
    const cell = tip.make("th", "x-text"), [before, after] = tip.tokens.context(table, i);
    cell.scope = "row"; cell.dir = "auto";
    cell.append(tip.make("span", "", before), tip.make("mark", "", tip.tokens.textAt(table, table.text[i]) || "∅"), tip.make("span", "", after));
    return cell;
  };

  const expectedCell = (table, i) => {
    const cell = tip.make("td", "x-expect");
    const [student, teacher] = ["student", "teacher"].map((model) => spaced(tip.tokens.textAt(table, table[model][i])));
    cell.append(tip.make("span", "", student || "–"), tip.make("span", "arrow", student === teacher ? " = " : " → "), tip.make("span", "", teacher || "–"));
    return cell;
  };

  const line = (table, i, run, opens) => {
    const row = tip.make("tr", `Q${table.now[i]}`), code = table.now[i];
    const rollout = table.rollouts[table.rollout[i]], reward = rollout[1];
    const tag = tip.make("td"); tag.append(tip.make("span", `tag ${tip.QUADRANTS[code]}`, tip.QUADRANTS[code]));
    const link = tip.make("a", "", opens(rollout[0]) ? "read" : "link");
    link.href = `#token=${tip.link.tokenValue(run, rollout[0], table.position[i])}`;
    link.setAttribute("aria-label", `${link.textContent}: token at position ${table.position[i]} of ${rollout[0]}`);
    const open = tip.make("td"); open.append(link);
    row.append(textCell(table, i), open, tag, expectedCell(table, i), tip.make("td", "", tip.tokens.nameOf(table, "kind", i)));
    row.append(tip.make("td", "number", reward === null ? "–" : tip.number(reward)));
    for (const [name] of columnsOf(table)) { row.append(tip.make("td", "number", tip.number(table[name][i]))); }
    return row;
  };

  const header = (table, sort, choose) => {
    const row = tip.make("tr");
    const plain = (text, className) => { const cell = tip.make("th", className ?? "", text); cell.scope = "col"; return cell; };
    const open = plain("");
    open.append(tip.make("span", "sr", "open"));
    row.append(plain("token in its text"), open, plain("quadrant"), plain("student → teacher"), plain("kind"), plain("reward", "number"));
    for (const [name, text] of columnsOf(table)) {
      const cell = plain("", "number"), button = tip.make("button", "sort", text);
      button.type = "button"; button.dataset.column = name;
      if (sort.column === name) { cell.setAttribute("aria-sort", sort.down ? "descending" : "ascending"); button.append(sort.down ? " ↓" : " ↑"); }
      button.addEventListener("click", () => choose(name));
      cell.append(button);
      row.append(cell);
    }
    return row;
  };

  /**
   * @param {HTMLTableElement} element
   * @param {{sort: Function, opens: Function}} on `sort(column)`; `opens(rollout)` says whether the
   *   browser has that rollout
   */
  const make = (element, on) => {
    const head = element.tHead, body = element.tBodies[0];
    const shown = { table: null, found: [], run: 0, count: 0 };
    const more = () => {
      const pieces = document.createDocumentFragment();
      const end = Math.min(shown.found.length, shown.count + STEP);
      for (let k = shown.count; k < end; k += 1) { pieces.append(line(shown.table, shown.found[k], shown.run, on.opens)); }
      shown.count = end;
      body.append(pieces);
      return shown.found.length - end;
    };
    /** Show the found tokens; returns how many are not shown yet. */
    const fill = (table, found, run, sort, pinned) => {
      const focused = document.activeElement?.dataset?.column;
      Object.assign(shown, { table, found, run, count: 0 });
      head.replaceChildren(header(table, sort, on.sort));
      body.replaceChildren();
      if (pinned >= 0) { const row = line(table, pinned, run, on.opens); row.classList.add("pinned"); body.append(row); }
      if (focused) { head.querySelector(`[data-column="${focused}"]`)?.focus(); }
      return more();
    };
    return { fill, more };
  };
  return { make, COLUMNS };
})();
