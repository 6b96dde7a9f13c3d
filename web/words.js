// What this pack writes on nodes by itself, in the languages of locales/.
const WORDS = {
  en: {
    skipped: "left out by denoise",
    untrained: "not trained at this sigma",
    trained: "trained sigmas",
    notTrained: "not the trained sigmas",
    anySteps: "any steps",
    steps: "{} steps",
    starts: "denoise starts at {}",
    warning: "Warning: ",
    drag: "drag the boundary to another step",
  },
  zh: {
    skipped: "\u88ab denoise \u8df3\u8fc7",
    untrained: "\u672a\u5728\u6b64 sigma \u8bad\u7ec3",
    trained: "\u8bad\u7ec3\u65f6\u7684 sigma",
    notTrained: "\u4e0d\u662f\u8bad\u7ec3\u65f6\u7684 sigma",
    anySteps: "\u6b65\u6570\u4efb\u610f",
    steps: "{} \u6b65",
    starts: "\u4ece\u964d\u566a {} \u5f00\u59cb",
    warning: "\u8b66\u544a\uff1a",
    drag: "\u62d6\u52a8\u8fb9\u754c\u5230\u53e6\u4e00\u6b65",
  },
};

export function localeOf(app) {
  return app.extensionManager?.setting?.get?.("Comfy.Locale") ?? "en";
}

export function words(app) {
  return WORDS[localeOf(app).split("-")[0]] ?? WORDS.en;
}
