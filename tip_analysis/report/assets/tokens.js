/**
 * The tokens that the page carries, as columns: which quadrant each is in under the cuts, which fit
 * the filters, in which order. Nothing here touches the document.
 */
tip.tokens = (() => {
  /** @param {object} run one entry of the page's data */
  const make = (run, data) => {
    const columns = {};
    for (const [name, column] of Object.entries(run.columns)) { columns[name] = tip.binary.unpack(column); }
    const table = { ...run, ...columns, columns, size: columns.position.length, before: data.before, after: data.after };
    table.lower = run.texts.map((text) => text.toLowerCase());
    table.now = columns.quadrant.slice();
    return table;
  };

  const isHigh = (value, cut) => value > cut || value === Infinity;

  /**
   * Put every token into its quadrant under two cuts, or back into the report's where `cuts` is null.
   * @returns {number[][]|null} tokens and summed loss of Q1 … Q4 among those carried
   */
  const assign = (table, cuts) => {
    const counts = [0, 0, 0, 0], loss = [0, 0, 0, 0];
    const { student_entropy: entropy, reverse_kl: divergence, quadrant, now } = table;
    for (let i = 0; i < table.size; i += 1) {
      const code = quadrant[i] === 0 || cuts === null ? quadrant[i]
        : (entropy[i] > cuts[0] ? 1 : 3) + (isHigh(divergence[i], cuts[1]) ? 0 : 1);
      now[i] = code;
      if (code) {
        counts[code - 1] += 1;
        if (divergence[i] !== Infinity) { loss[code - 1] += divergence[i]; }
      }
    }
    return [counts, loss];
  };

  const reward = (table, i) => table.rollouts[table.rollout[i]][1];
  const REWARDS = {
    any: () => true,
    rewarded: (value) => value !== null && value > 0.5,
    unrewarded: (value) => value !== null && value <= 0.5,
    ungraded: (value) => value === null,
  };

  /** The tests that a token must pass, only those that are asked for. */
  const tests = (table, filters) => {
    const list = [(i) => table.now[i] !== 0 && filters.quadrants.has(table.now[i])];
    for (const name of ["kind", "segment", "planted_label", "artefact"]) {
      const code = filters[name] ? table.names[name]?.indexOf(filters[name]) + 1 : 0;
      if (code > 0) { const column = table[name]; list.push((i) => column[i] === code); }
    }
    if (filters.reward && filters.reward !== "any") { list.push((i) => REWARDS[filters.reward](reward(table, i))); }
    if (filters.rule) {
      const [index, ratio] = filters.rule, column = table[`kept${index}`];
      list.push((i) => column[i] !== 0 && column[i] <= ratio);
    }
    if (filters.text) { list.push((i) => table.lower[table.text[i]].includes(filters.text)); }
    if (filters.box) {
      const [left, right, low, high] = filters.box, { student_entropy: h, reverse_kl: d } = table;
      list.push((i) => (h[i] > left || left === 0) && h[i] <= right && (d[i] > low || low === 0) && d[i] <= high);
    }
    return list;
  };

  /** Indices of the tokens that fit, sorted; ties stay in the order of the run. */
  const find = (table, filters, sort) => {
    const list = tests(table, filters), found = [];
    for (let i = 0; i < table.size; i += 1) { if (list.every((test) => test(i))) { found.push(i); } }
    const column = table[sort.column];
    if (column) {
      const sign = sort.down ? -1 : 1;
      const key = (i) => (Number.isNaN(column[i]) ? -Infinity : sign * column[i]);
      const last = (i) => Number.isNaN(column[i]);
      found.sort((a, b) => last(a) - last(b) || (key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : a - b));
    }
    return found;
  };

  const textAt = (table, index) => table.texts[index] ?? "";

  /** The texts before and after a token. */
  const context = (table, i) => {
    const { before, after } = table, texts = [[], []];
    if (table.around) {
      const start = i * (before + after);
      for (let k = 0; k < before + after; k += 1) { texts[k < before ? 0 : 1].push(textAt(table, table.around[start + k])); }
    } else {
      for (let k = -before; k <= after; k += 1) {
        if (k && table.rollout[i + k] === table.rollout[i]) { texts[k < 0 ? 0 : 1].push(textAt(table, table.text[i + k])); }
      }
    }
    return texts.map((parts) => parts.join(""));
  };

  /** The rules that keep a token, each with its smallest ρ. */
  const keptBy = (table, i) => table.rules.flatMap((rule, index) => {
    const code = table[`kept${index}`][i];
    return code ? [[rule, table.ratios[code - 1]]] : [];
  });

  /** Where a token is: index by rollout id and position, −1 where it is not carried. */
  const indexOf = (table, rollout, position) => {
    const number = table.rollouts.findIndex(([name]) => name === rollout);
    if (number < 0) { return -1; }
    for (let i = 0; i < table.size; i += 1) { if (table.rollout[i] === number && table.position[i] === position) { return i; } }
    return -1;
  };

  const nameOf = (table, column, i) => (table[column]?.[i] ? table.names[column][table[column][i] - 1] : "");

  return { make, assign, find, context, keptBy, indexOf, reward, nameOf, textAt };
})();
