"use strict";
/**
 * What all parts of the page share. Each file adds one member to `tip`; a text from a run is put in
 * place with textContent only, never parsed as markup.
 */
const tip = {};

/** The element with an id. */
tip.at = (id) => document.getElementById(id);

/**
 * A new element.
 * @param {string} tag
 * @param {string} [className]
 * @param {string} [text] put in place as text
 * @returns {HTMLElement}
 */
tip.make = (tag, className, text) => {
  const element = document.createElement(tag);
  if (className) { element.className = className; }
  if (text !== undefined) { element.textContent = text; }
  return element;
};

/** Add an option to a select. */
tip.option = (select, value, text) => {
  const item = tip.make("option", "", text);
  item.value = value;
  select.append(item);
};

/** The JSON of a data element, or null where the page has none. */
tip.data = (id) => {
  const holder = tip.at(id);
  return holder ? JSON.parse(holder.textContent) : null;
};

/** 0.123 as 12.3%. */
tip.percent = (value) => (Number.isFinite(value) ? `${(100 * value).toFixed(1)}%` : "–");

/** 12,345. */
tip.count = (value) => Math.round(value).toLocaleString("en-US");

/** Three significant digits; what is not known reads –. */
tip.number = (value) => {
  if (value === null || value === undefined || Number.isNaN(value)) { return "–"; }
  if (typeof value === "string") { return value; }
  if (value === Infinity) { return "∞"; }
  if (value === 0) { return "0"; }
  const size = Math.abs(value);
  const text = size < 1e-3 || size >= 1e6 ? value.toExponential(2) : String(Number(value.toPrecision(3)));
  return text.replaceAll("-", "−");
};

/** Quadrants by code; 0 is what the student did not write. */
tip.QUADRANTS = ["not the student’s", "Q1", "Q2", "Q3", "Q4"];
