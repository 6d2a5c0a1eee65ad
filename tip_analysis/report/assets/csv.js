/** Tokens as a file of comma-separated values, made in the page and saved by the browser. */
tip.csv = (() => {
  /** A cell; texts are in JSON's quotes, so that no spreadsheet takes one for a formula. */
  const cell = (value) => {
    if (typeof value === "number") { return Number.isNaN(value) ? "" : String(value); }
    if (value === null || value === undefined) { return ""; }
    return `"${value.replaceAll('"', '""')}"`;
  };
  const quoted = (text) => JSON.stringify(text);

  /** The file's text: a header, and a line for each row. */
  const write = (header, rows) => [header, ...rows].map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";

  /** Have the browser save a text. */
  const save = (name, text) => {
    const link = tip.make("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/csv;charset=utf-8" }));
    link.download = name;
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  };
  return { write, save, quoted };
})();
