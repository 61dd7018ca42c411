// Say in words that the server is gone: Gradio shows an empty message, or nothing.
() => {
  const first = navigator.language.toLowerCase();
  const starts = (prefixes) => prefixes.some((prefix) => first.startsWith(prefix));
  const language = starts(TRADITIONAL) ? "zh-TW" : starts(["zh"]) ? "zh" : "en";
  document.documentElement.lang = language;
  const show = (text) => {
    document.body.classList.toggle("offline", Boolean(text));
    const notice = document.querySelector("#notice [role=alert]");
    if (notice) notice.textContent = text;
  };
  const tell = (error) => {
    if (error?.name !== "AbortError") show(OFFLINE[language]); // else the page itself has ended the request
  };
  const send = window.fetch;
  window.fetch = async (...request) => {
    const url = String(request[0]?.url ?? request[0]);
    try {
      const response = await send(...request);
      if (url.includes("/queue/join")) {
        if (response.status >= 500) tell();
        else if (document.body.classList.contains("offline")) show("");
      }
      // Answers come over one stream, which breaks when the server stops.
      if (url.includes("/queue/data")) response.clone().body?.pipeTo(new WritableStream()).catch(tell);
      return response;
    } catch (error) {
      tell(error);
      throw error;
    }
  };
}
