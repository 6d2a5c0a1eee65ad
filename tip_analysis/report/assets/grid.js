/**
 * Shares of the quadrants under any pair of cuts, from the joint histogram.
 *
 * Cell i of an axis holds the values with i edges strictly below them, so that "above edge k" is
 * "cell k + 1 or more", exactly; divergences of +∞ lie in a last column above every edge. Suffix
 * sums over both axes answer any pair of edges in a few look-ups.
 */
tip.grid = (() => {
  /** [E + 2, D + 3] sums over all cells at or above (i, j). */
  const suffixSums = (cells, values, rows, columns) => {
    const width = columns + 1, sums = new Float64Array((rows + 1) * width);
    cells.forEach((cell, k) => { sums[Math.floor(cell / columns) * width + (cell % columns)] = values[k]; });
    for (let i = rows - 1; i >= 0; i -= 1) {
      let row = 0;
      for (let j = columns - 1; j >= 0; j -= 1) {
        row += sums[i * width + j];
        sums[i * width + j] = row + sums[(i + 1) * width + j];
      }
    }
    return sums;
  };

  /** @param {object} raw `entropy` and `divergence` edges; `cells`, `counts`, `loss` packed. */
  const make = (raw) => {
    const cells = tip.binary.unpack(raw.cells), counts = tip.binary.unpack(raw.counts);
    const rows = raw.entropy.length + 1, columns = raw.divergence.length + 2;
    return {
      entropy: raw.entropy, divergence: raw.divergence, rows, columns, cells, counts,
      countSums: suffixSums(cells, counts, rows, columns),
      lossSums: suffixSums(cells, tip.binary.unpack(raw.loss), rows, columns),
    };
  };

  /** How many edges are strictly below a value, or with `orEqual` at most it. */
  const place = (edges, value, orEqual = false) => {
    let low = 0, high = edges.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (edges[middle] < value || (orEqual && edges[middle] === value)) { low = middle + 1; } else { high = middle; }
    }
    return low;
  };

  const quadrants = (sums, grid, i, j) => {
    const width = grid.columns + 1, at = (a, b) => sums[a * width + b];
    const all = at(0, 0), both = at(i, j), high = at(i, 0), wide = at(0, j);
    return [both, high - both, wide - both, all - high - wide + both];
  };

  /** Where a cut lies: the edges on either side of it, and how far between them. */
  const between = (edges, cut) => {
    const right = place(edges, cut);
    if (edges[right] === cut || right === 0) { return [right, right, 0]; }
    if (right >= edges.length) { return [edges.length - 1, edges.length - 1, 0]; }
    return [right - 1, right, (cut - edges[right - 1]) / (edges[right] - edges[right - 1])];
  };

  /**
   * Tokens and summed loss of Q1 … Q4.
   * @returns {{counts: number[], loss: number[], exact: boolean, spread: number}} `exact` where both
   * cuts are edges; else values are interpolated, and no share is further off than `spread`.
   */
  const under = (grid, entropyCut, divergenceCut) => {
    const [a, b, s] = between(grid.entropy, entropyCut), [c, d, t] = between(grid.divergence, divergenceCut);
    const corners = [[a, c, (1 - s) * (1 - t)], [b, c, s * (1 - t)], [a, d, (1 - s) * t], [b, d, s * t]];
    const mix = (sums) => {
      const total = [0, 0, 0, 0];
      for (const [i, j, weight] of corners) {
        if (weight) { quadrants(sums, grid, i + 1, j + 1).forEach((value, q) => { total[q] += weight * value; }); }
      }
      return total;
    };
    const exact = a === b && c === d, all = grid.countSums[0] || 1;
    const ends = exact ? [] : corners.map(([i, j]) => quadrants(grid.countSums, grid, i + 1, j + 1));
    const spread = Math.max(0, ...[0, 1, 2, 3].map((q) => {
      const values = ends.map((end) => end[q]);
      return ends.length ? (Math.max(...values) - Math.min(...values)) / all : 0;
    }));
    return { counts: mix(grid.countSums), loss: mix(grid.lossSums), exact, spread };
  };

  /** Tokens in (left, right] × (low, high], edges all. */
  const inside = (grid, [left, right, low, high]) => {
    const width = grid.columns + 1;
    const from = (edges, value) => (value <= 0 ? 0 : place(edges, value, true));
    const to = (edges, value, last) => (value === Infinity ? last : place(edges, value, true));
    const i0 = from(grid.entropy, left), i1 = to(grid.entropy, right, grid.rows);
    const j0 = from(grid.divergence, low), j1 = to(grid.divergence, high, grid.columns);
    const at = (i, j) => grid.countSums[i * width + j];
    return at(i0, j0) - at(i1, j0) - at(i0, j1) + at(i1, j1);
  };

  return { make, place, under, inside };
})();
