"use strict";
// Without this the two pictures stand side by side.
document.documentElement.classList.add("js");
for (const compare of document.querySelectorAll(".compare")) {
  const slider = compare.querySelector("input");
  const move = () => {
    compare.style.setProperty("--cut", slider.value + "%");
    slider.setAttribute("aria-valuetext", slider.value + " % pretrained, the rest merged");
  };
  const follow = (event) => {
    const box = compare.querySelector("img").getBoundingClientRect();
    slider.value = 100 * (event.clientX - box.left) / box.width;
    move();
  };
  slider.hidden = false;
  slider.addEventListener("input", move);
  for (const figure of compare.querySelectorAll("figure")) {
    figure.addEventListener("pointerdown", (event) => {
      event.preventDefault();
      figure.setPointerCapture(event.pointerId);
      follow(event);
    });
    figure.addEventListener("pointermove", (event) => { if (figure.hasPointerCapture(event.pointerId)) follow(event); });
  }
  move();
}
// On paper everything is open.
let closed = [];
addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("details:not([open])")];
  for (const details of closed) details.open = true;
});
addEventListener("afterprint", () => { for (const details of closed) details.open = false; });
