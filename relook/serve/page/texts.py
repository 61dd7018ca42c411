"""All texts of the page, in each of its languages."""

from __future__ import annotations

from relook.serve.protocol import APIError

ENGLISH = {
    "picture": "Picture",
    "examples": "Drawn pictures, of which it is known what is on them",
    "settings": "Sampling",
    "temperature": "Temperature (0: the most likely word)",
    "top_p": "Top p",
    "max_tokens": "Longest answer, in tokens",
    "seed": "Seed (empty: another each time)",
    "question": "Question",
    "ask_here": "What is in this picture?",
    "ask": "Ask",
    "stop": "Stop",
    "clear": "Start again",
    "last": "The last answer",
    "words": "The last answer: click a word to see where the post decoder looked before it",
    "map": "Where it looked",
    "absent": "not there",
    "there_is": "On this picture: {names}. Words for other objects are marked in the answers.",
    "before": "{model}, before “{word}”. Brighter: more attention. The picture is shown as the model gets it.",
    "no_map": "There is nothing to show: {model} has no post decoder that looks at a picture here.",
    "no_question": "Write a question first.",
    "no_picture": "The picture is not on the server any more. Upload it again.",
}
CHINESE = {
    "picture": "图片",
    "examples": "绘制的图片（图中物体已知）",
    "settings": "采样设置",
    "temperature": "温度（0：总取最可能的词）",
    "top_p": "Top p",
    "max_tokens": "回答的最大长度（词元数）",
    "seed": "随机种子（留空：每次不同）",
    "question": "问题",
    "ask_here": "这张图片里有什么？",
    "ask": "提问",
    "stop": "停止",
    "clear": "重新开始",
    "last": "最近的回答",
    "words": "最近的回答：点击一个词，查看后解码器在它之前看向哪里",
    "map": "关注的位置",
    "absent": "图中没有",
    "there_is": "图中有：{names}。回答中提到的其他物体会被标出。",
    "before": "{model}，在“{word}”之前。越亮表示关注越多。图片按模型看到的样子显示。",
    "no_map": "没有可显示的内容：{model} 在这里没有看图的后解码器。",
    "no_question": "请先写一个问题。",
    "no_picture": "图片已不在服务器上，请重新上传。",
}
TEXTS = {"en": ENGLISH, "zh": CHINESE}
# Errors of the API by code, where the page says them in Chinese too; the API's own text, in English, follows.
CHINESE_ERRORS = {
    "invalid_message": "无法使用这个问题或图片。",
    "too_many_images": "图片太多。",
    "context_length_exceeded": "对话太长，请重新开始。",
    "busy": "服务器正忙，请稍后再试。",
    "timeout": "回答超时。",
    "failed": "服务器处理失败。",
}


def language_of(accepted: str) -> str:
    """Choose the page's language for an Accept-Language header, by its first entry, as Gradio's labels do."""
    return "zh" if accepted.lower().startswith("zh") else "en"


def translate(language: str, key: str, **values: str) -> str:
    """Return a text in a language, its placeholders filled in."""
    return TEXTS[language][key].format(**values)


def explain_error(language: str, error: APIError) -> str:
    """Explain an error of the API to a person."""
    code = error.code or ""
    if code in ENGLISH:  # the page's own
        return translate(language, code)
    return f"{CHINESE_ERRORS.get(code, '出错了。')} {error.message}" if language == "zh" else error.message
