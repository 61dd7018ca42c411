// Upload a chosen, dropped or pasted picture; tell which example was chosen, and that the picture is to be removed.
const take = async (file, add = false) => {
  if (!file) return;
  // Gradio would say so in its own words, in English.
  if (file.size > Number(element.querySelector(".drop")?.dataset.maxBytes)) return trigger("refused");
  try {
    const { path } = await upload(file);
    trigger("upload", { path, add: add ? "add" : "" });
  } catch {
    trigger("refused"); // an event of that name, because Gradio keeps "error" to itself
  }
};
element.addEventListener("change", (event) => {
  take(event.target.files?.[0], event.target.classList.contains("add"));
  event.target.value = "";
});
element.addEventListener("click", (event) => {
  const example = event.target.closest(".example");
  if (example) trigger("select", { name: example.dataset.name });
  if (event.target.closest(".remove")) trigger("clear");
});
for (const kind of ["dragenter", "dragover", "dragleave", "drop"])
  element.addEventListener(kind, (event) => {
    event.preventDefault();
    element.querySelector(".drop")?.classList.toggle("over", kind.startsWith("dragen") || kind === "dragover");
    if (kind === "drop") take(event.dataTransfer.files[0]);
  });
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find((pasted) => pasted.type.startsWith("image/"));
  if (file) event.preventDefault(), take(file);
});
