/**
 * The state of the page in its address: `#token=0/ROLLOUT/7&entropy=0.5&quadrant=Q3`. Parts change
 * what they own and leave the rest as it is.
 */
tip.link = (() => {
  const state = new Map(), listeners = [];

  const parse = (fragment) => {
    const found = new Map();
    if (!fragment.includes("=")) { return null; }
    for (const part of fragment.replace(/^#/, "").split("&")) {
      const cut = part.indexOf("=");
      if (cut > 0) { found.set(part.slice(0, cut), part.slice(cut + 1)); }
    }
    return found;
  };

  /** The text of a value, or null where it is no valid encoding. */
  const decode = (value) => { try { return decodeURIComponent(value); } catch { return null; } };

  const text = () => [...state].map(([key, value]) => `${key}=${value}`).join("&");

  /** Set values (encoded already) or remove those that are null, and show them in the address. */
  const update = (values) => {
    for (const [key, value] of Object.entries(values)) { if (value === null) { state.delete(key); } else { state.set(key, value); } }
    try { history.replaceState(null, "", state.size ? `#${text()}` : location.pathname + location.search); } catch { /* some viewers forbid it */ }
  };

  /** Read the address, and tell those who listen. */
  const follow = () => {
    const found = parse(location.hash);
    if (!found) { return; }
    state.clear();
    for (const [key, value] of found) { state.set(key, value); }
    for (const listener of listeners) { listener(state); }
  };

  const listen = (listener) => listeners.push(listener);
  window.addEventListener("hashchange", follow);

  /** Run, rollout and position of a `token=` value; null where it is none. */
  const token = (value) => {
    const parts = /^(\d+)\/([^/]+)\/(\d+)$/.exec(value ?? "");
    const name = parts ? decode(parts[2]) : null;
    return name === null ? null : { run: Number(parts[1]), rollout: name, position: Number(parts[3]) };
  };

  /** The value of `token=` for a token. */
  const tokenValue = (run, rollout, position) => `${run}/${encodeURIComponent(rollout)}/${position}`;

  return { update, follow, listen, token, tokenValue, decode, get: (key) => state.get(key) ?? null };
})();
