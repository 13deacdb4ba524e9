"use strict";
// Charts: lines over steps or positions, and bars to compare losses.

const bits = (nats) => nats / Math.LN2;
const bar = (kind, share) => el("span", { class: `bar ${kind}`, "aria-hidden": "true", "--w": share });

// Return a chart of lines that is drawn again when its width changes. `describe()` returns {label, xName, yName,
// series: [{name, points: [[x, y], ...]}], marker: x or null}.
function lineChart(describe) {
  const box = el("div", { class: "chart" });
  box.draw = () => {
    const width = Math.max(280, box.clientWidth || 640);
    box.replaceChildren(drawLines(describe(), width, Math.round(Math.min(340, 150 + width / 5))));
  };
  let width = 0;
  new ResizeObserver(() => {
    if (box.clientWidth && box.clientWidth !== width) box.draw();
    width = box.clientWidth;
  }).observe(box);
  return box;
}

// Return the number of decimals that shows each tick exactly.
const decimals = (found) =>
  Math.max(...found.map((tick) => String(Number(tick.toPrecision(9))).split(".")[1]?.length ?? 0));

function drawLines({ label, xName, yName, series, marker = null }, width, height) {
  const left = 44, right = 12, top = 28, bottom = 40, points = series.flatMap((line) => line.points);
  const xs = points.map(([x]) => x), ys = points.map(([, y]) => y), yTicks = ticks(Math.min(...ys), Math.max(...ys));
  const x0 = Math.min(...xs), x1 = Math.max(...xs);
  const y0 = Math.min(yTicks[0], ...ys), y1 = Math.max(yTicks.at(-1), ...ys);
  const atX = (x) => left + ((x - x0) / (x1 - x0 || 1)) * (width - left - right);
  const atY = (y) => height - bottom - ((y - y0) / (y1 - y0 || 1)) * (height - top - bottom);
  const text = (x, y, anchor, content) => svg("text", { x, y, "text-anchor": anchor }, content);
  const rule = (kind, xa, ya, xb, yb) => svg("line", { class: kind, x1: xa, y1: ya, x2: xb, y2: yb });
  // A label in the middle of the right edge would be cut off.
  const atEdge = (x) => (x > width - 28 ? [width, height - bottom + 20, "end"] : [x, height - bottom + 20, "middle"]);
  const digits = decimals(yTicks), xTicks = ticks(x0, x1), xDigits = decimals(xTicks);
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": label },
    yTicks.map((y) => rule("grid", left, atY(y), width - right, atY(y))),
    yTicks.map((y) => text(left - 8, atY(y) + 4, "end", fixed(y, digits))),
    xTicks.map((x) => text(...atEdge(atX(x)), fixed(x, xDigits))),
    text(width - right, height - 4, "end", xName), text(0, 12, "start", yName),
    marker === null ? null : rule("marker", atX(marker), top, atX(marker), height - bottom),
    series.map((line, n) => drawLine(line.points, n, atX, atY, marker)));
}

// Return line number n, with dots if its points are few. The dot at the marker is larger.
function drawLine(points, n, atX, atY, marker) {
  const path = points.map(([x, y]) => `${atX(x).toFixed(1)},${atY(y).toFixed(1)}`).join(" ");
  const dots = points.filter(([x]) => points.length < 40 || x === marker).map(([x, y]) => {
    const here = x === marker;
    return svg("circle", { class: `dot line${n}${here ? " here" : ""}`, cx: atX(x), cy: atY(y), r: here ? 5 : 2.5 });
  });
  return [svg("polyline", { class: `line line${n}`, points: path }), dots];
}

// Return the names of the lines of a chart with their strokes.
function lineKey(names) {
  const stroke = (n) => svg("svg", { class: "stroke", viewBox: "0 0 24 8", "aria-hidden": "true" },
    svg("line", { class: `line line${n}`, x1: 0, x2: 24, y1: 4, y2: 4 }));
  return el("p", { class: "key" }, names.map((name, n) => el("span", {}, stroke(n), name)));
}

// Return bars to compare bits per character: [name, bits, whether to emphasize the row].
function barChart(rows) {
  const top = Math.max(...rows.map(([, value]) => value));
  return el("dl", { class: "compare" }, rows.map(([name, value, own]) => el("div", { class: own ? "own" : "" },
    el("dt", {}, name), el("dd", {}, bar("after", value / top), el("b", {}, fixed(value))))));
}
