/** The theme button, and the mark of the section being read. */
tip.page = (() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const order = ["auto", "light", "dark"];
  const stored = () => { try { return localStorage.getItem("tip-theme"); } catch { return null; } };
  const apply = (theme) => {
    if (theme === "auto") { delete root.dataset.theme; } else { root.dataset.theme = theme; }
    button.textContent = `Theme: ${theme}`;
    button.dataset.current = theme;
  };
  apply(order.includes(stored()) ? stored() : "auto");
  button.addEventListener("click", () => {
    const next = order[(order.indexOf(button.dataset.current) + 1) % order.length];
    try { localStorage.setItem("tip-theme", next); } catch { /* no storage: the choice lasts as long as the page */ }
    apply(next);
  });

  const unfold = () => {
    if (!location.hash || location.hash.includes("=")) { return; }
    const target = document.getElementById(location.hash.slice(1));
    for (let fold = target?.closest("details"); fold; fold = fold.parentElement.closest("details")) { fold.open = true; }
    if (target?.closest("details")) { target.scrollIntoView({ block: "center", behavior: "instant" }); }
  };
  window.addEventListener("hashchange", unfold);
  unfold();

  const links = new Map([...document.querySelectorAll(".contents a")].map((link) => [link.hash.slice(1), link]));
  const seen = new Set();
  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries) { if (entry.isIntersecting) { seen.add(entry.target.id); } else { seen.delete(entry.target.id); } }
    const current = [...links.keys()].find((key) => seen.has(key));
    for (const [key, link] of links) { if (key === current) { link.setAttribute("aria-current", "true"); } else { link.removeAttribute("aria-current"); } }
  }, { rootMargin: "0px 0px -60% 0px" });
  for (const section of document.querySelectorAll("section[id]")) { observer.observe(section); }
})();
