/** What moved between two runs: a cell of the flow table lists its tokens, both runs side by side. */
tip.moves = (() => {
  const { make } = tip, pairs = tip.data("moves-data");
  if (!pairs) { return null; }
  const MEASURES = ["entropy", "reverse KL", "forward KL"];

  const header = (pair) => {
    const row = make("tr");
    const add = (text, className = "") => { const cell = make("th", className, text); cell.scope = "col"; row.append(cell); };
    add("token in its text"); add(""); add(`${pair.names[0]} expects`); add(`${pair.names[1]} expects`);
    for (const name of MEASURES) { add(`${name} a`, "number"); add("b", "number"); }
    return row;
  };

  const line = (token) => {
    const [, to, rollout, position, before, text, after, first, second, ...numbers] = token;
    const row = make("tr", `Q${to}`), cell = make("th", "x-text"), open = make("td"), link = make("a", "", "read");
    cell.scope = "row"; cell.dir = "auto";
    cell.append(make("span", "", before), make("mark", "", text || "∅"), make("span", "", after));
    link.href = `#token=${tip.link.tokenValue(0, rollout, position)}`;
    link.setAttribute("aria-label", `read: token at position ${position} of ${rollout}`);
    open.append(link);
    row.append(cell, open, make("td", "x-expect", first.replaceAll(" ", "␣")), make("td", "x-expect", second.replaceAll(" ", "␣")));
    for (const value of numbers) { row.append(make("td", "number", tip.number(value))); }
    return row;
  };

  const start = (box, pair) => {
    const buttons = [...box.querySelectorAll(".flow-cell")], table = box.querySelector(".moves-table"), words = box.querySelector(".moves-words");
    table.tHead.replaceChildren(header(pair));
    const choose = (button) => {
      const from = Number(button.dataset.from), to = Number(button.dataset.to);
      const tokens = pair.tokens.filter((token) => token[0] === from && token[1] === to);
      for (const other of buttons) { other.setAttribute("aria-pressed", String(other === button)); }
      table.tBodies[0].replaceChildren(...tokens.map(line));
      const { count } = pair.flow[from - 1][to - 1];
      words.textContent = `From Q${from} to Q${to}: ${count} tokens; listed are the ${tokens.length} whose reverse KL changes most (a: ${pair.names[0]}, b: ${pair.names[1]}; nats).`;
    };
    for (const button of buttons) { button.addEventListener("click", () => choose(button)); }
    const number = (button) => Number(pair.flow[button.dataset.from - 1][button.dataset.to - 1].count.replaceAll(",", ""));
    const moved = buttons.filter((button) => button.dataset.from !== button.dataset.to).sort((x, y) => number(y) - number(x))[0];
    choose(number(moved) ? moved : buttons[0]);
  };
  document.querySelectorAll(".moves").forEach((box) => start(box, pairs[Number(box.dataset.pair)]));
  return {};
})();
