(() => {
"use strict";
const figure = JSON.parse(document.getElementById("data").textContent);
Plotly.newPlot("plot", figure.data, figure.layout, {responsive: true, displaylogo: false});
})();
