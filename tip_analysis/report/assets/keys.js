/** Keys of the whole page: `/` searches, `?` lists all keys. Then the address is read. */
tip.keys = (() => {
  const help = tip.at("keys");
  const types = (element) => element?.closest("input:not([type=range]), select, textarea, [contenteditable]");
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || types(event.target) || help.open) { return; }
    if (event.key === "/") {
      const field = tip.at("b-search");
      if (!field || tip.at("token-browser").hidden) { return; }
      event.preventDefault();
      field.focus();
      field.select();
      tip.at("token-browser").scrollIntoView({ block: "start", behavior: "instant" });
    }
    if (event.key === "?") { event.preventDefault(); help.showModal(); }
  });
  tip.at("keys-close").addEventListener("click", () => help.close());
  tip.at("keys-open").addEventListener("click", () => help.showModal());
  tip.explore?.follow();
  tip.link.follow();
})();
