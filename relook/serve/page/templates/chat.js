// Tell which word was clicked; keep the end of the answer, or the map of a word, in sight.
element.addEventListener("click", (event) => {
  const word = event.target.closest(".word");
  if (!word) return;
  word.setAttribute("aria-busy", "true");
  trigger("select", { place: word.dataset.place });
});
watch("value", () => {
  const scroll = element.querySelector(".scroll");
  const map = element.querySelector(".map");
  if (map) map.scrollIntoView({ block: "nearest" });
  else if (scroll) scroll.scrollTop = scroll.scrollHeight;
});
