// SVG and HTML elements. Texts are set as text, never as markup: names of nodes come from other machines.

const SVG = "http://www.w3.org/2000/svg";

export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

export function html(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

export function colour(share) {
  // From blue over orange to red, as a share goes from 0 to 1.
  const stops = [[42, 127, 184], [217, 130, 43], [194, 48, 48]];
  const at = Math.min(1, Math.max(0, share)) * 2;
  const low = stops[Math.min(1, Math.floor(at))];
  const high = stops[Math.min(1, Math.floor(at)) + 1];
  const part = at - Math.min(1, Math.floor(at));
  return `rgb(${low.map((value, index) => Math.round(value + part * (high[index] - value))).join(" ")})`;
}
