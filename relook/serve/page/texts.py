"""All texts of the page, in each of its languages."""

from __future__ import annotations

from relook.serve.protocol import APIError

ENGLISH = {
    "title": "Ask a model about a picture",
    "lead": "{name} answers questions about the picture.",
    "lead_compared": "{name} and {others} answer the same question side by side, so that you can compare them.",
    "looks": "Click a word of an answer to see where the model looked just before it wrote that word.",
    "start": "Choose a picture and ask, or click an example: it is asked “{question}” at once.",
    "picture": "Picture",
    "no_picture_yet": "No picture yet.",
    "upload": "Choose a picture, drop it here, or paste it",
    "remove": "Remove the picture",
    "add": "Add a picture to the next question",
    "added": "Pictures that the next question adds",
    "examples": "Examples: drawn, so it is known what is on them",
    "example": "Example {number}: {names}",
    "run_pictures": "Pictures that {name} was trained on",
    "run_picture": "Training picture {number}",
    "there_is": "On this picture: {names}. Words for other objects are marked in the answers.",
    "settings": "Sampling",
    "temperature": "Temperature (0: always the most likely word)",
    "top_p": "Top p",
    "max_tokens": "Longest answer, in tokens",
    "seed": "Seed (empty: another each time)",
    "conversation": "Dialogue",
    "you": "Question",
    "served": "the served model",
    "compared": "for comparison",
    "without_picture": "asked without a picture",
    "once_more": "Another answer, at temperature {temperature}",
    "question": "Question",
    "ask_here": "What is in this picture?",
    "ask": "Ask",
    "stop": "Stop",
    "again": "Another answer",
    "clear": "Start again",
    "growing": "The answer is coming …",
    "length": "Cut off at the longest answer that “Sampling” allows, or at the model's own limit.",
    "cancelled": "Stopped before its end.",
    "failed": "The server failed before its end.",
    "empty": "The model ended its answer without a word.",
    "absent": "not there",
    "click_word": "Click a word: where did {name} look before it?",
    "map": "Map of {name}'s attention before “{word}”",
    "before": "Where {name} looked before “{word}”: more colour is more attention. The picture is what the model gets.",
    "no_map": "There is nothing to show: the answer is not about a picture that {name} looks at.",
    "no_question": "Write a question first.",
    "no_picture": "The picture is not on the server any more. Choose it again.",
    "bad_picture": "That picture was not taken: send a PNG, JPEG, WebP, GIF or BMP file of at most {megabytes:g} MB "
    "and {megapixels:g} million pixels.",
    "bad_setting": "“{setting}” must be {range}. It is under “Sampling”.",
    "range_temperature": "a number from 0 to 2",
    "range_top_p": "a number from 0 to 1",
    "range_max_tokens": "a whole number from 1",
    "range_seed": "a whole number, or empty",
    "invalid_message": "The question cannot be asked: it may not hold marks such as <image>.",
    "context_length_exceeded": "The conversation is too long for the model. Start again, or ask for a shorter answer.",
    "too_many_images": "The conversation has more pictures than the server takes. Start again.",
    "busy": "The server is busy. Try again in a moment.",
    "timeout": "The answer took too long and was ended.",
    "failure": "The server failed on this question. Ask again; its log says more.",
    "offline": "The server does not answer: it was stopped or restarts. Once it runs again, reload this page; the "
    "conversation is kept.",
}
CHINESE = {
    "title": "就图片向模型提问",
    "lead": "{name} 回答关于图片的问题。",
    "lead_compared": "{name} 与 {others} 并排回答同一个问题，便于对比。",
    "looks": "点击回答中的一个词，查看模型写下它之前看向图片的哪里。",
    "start": "选择一张图片并提问，或点击一个示例：会立即提问“{question}”。",
    "picture": "图片",
    "no_picture_yet": "还没有图片。",
    "upload": "选择图片、拖到这里或粘贴",
    "remove": "移除图片",
    "add": "下一个问题再加一张图片",
    "added": "下一个问题加上的图片",
    "examples": "示例：绘制的图片，图中物体已知",
    "example": "示例 {number}：{names}",
    "run_pictures": "{name} 训练时用过的图片",
    "run_picture": "训练图片 {number}",
    "there_is": "图中有：{names}。回答中提到的其他物体会被标出。",
    "settings": "采样设置",
    "temperature": "温度（0：总取最可能的词）",
    "top_p": "核采样概率 p",
    "max_tokens": "回答的最大长度（词元数）",
    "seed": "随机种子（留空：每次不同）",
    "conversation": "对话",
    "you": "问题",
    "served": "所服务的模型",
    "compared": "用于对比",
    "without_picture": "提问时没有图片",
    "once_more": "另一个回答，温度 {temperature}",
    "question": "问题",
    "ask_here": "这张图片里有什么？",
    "ask": "提问",
    "stop": "停止",
    "again": "换个回答",
    "clear": "重新开始",
    "growing": "正在回答……",
    "length": "已达到“采样设置”允许的最大长度或模型自身的上限，回答在此截断。",
    "cancelled": "回答未完，已停止。",
    "failed": "回答未完，服务器出错。",
    "empty": "模型没有写任何词就结束了回答。",
    "absent": "图中没有",
    "click_word": "点击一个词：{name} 在它之前看向哪里？",
    "map": "{name} 在“{word}”之前的注意力图",
    "before": "{name} 在“{word}”之前看向的位置：颜色越浓表示关注越多。图片按模型看到的样子显示。",
    "no_map": "没有可显示的内容：这个回答不涉及 {name} 所看的图片。",
    "no_question": "请先写一个问题。",
    "no_picture": "图片已不在服务器上，请重新选择。",
    "bad_picture": "无法使用这张图片：请使用 PNG、JPEG、WebP、GIF 或 BMP 文件，不超过 {megabytes:g} MB 和 "
    "{megapixels:g} 百万像素。",
    "bad_setting": "“{setting}”必须是{range}，见“采样设置”。",
    "range_temperature": " 0 到 2 之间的数",
    "range_top_p": " 0 到 1 之间的数",
    "range_max_tokens": "不小于 1 的整数",
    "range_seed": "整数或留空",
    "invalid_message": "无法提出这个问题：其中不能包含 <image> 这类标记。",
    "context_length_exceeded": "对话对模型来说太长，请重新开始或缩短回答的最大长度。",
    "too_many_images": "对话中的图片太多，请重新开始。",
    "busy": "服务器正忙，请稍后再试。",
    "timeout": "回答超时，已结束。",
    "failure": "服务器处理这个问题时出错，请再试一次；详情见服务器日志。",
    "offline": "服务器没有响应：它已停止或正在重启。恢复后请刷新本页，对话会保留。",
}
# For Taiwan, Hong Kong and Macau: CHINESE in traditional characters, and their words where these differ.
_WORDS = {
    "服务器": "伺服器",
    "采样设置": "取樣設定",
    "核采样概率": "核取樣機率",
    "文件": "檔案",
    "粘贴": "貼上",
    "刷新": "重新整理",
    "点击": "點選",
}
_CHARACTERS = str.maketrans(
    "颜浓图问关于题与并个别训练词写里选择张会还没这绘制体时过标样温总长数随机种对话务么换开达许断错结显内请无万须见间类记来说缩后试处详志响应启复页",
    "顏濃圖問關於題與並個別訓練詞寫裡選擇張會還沒這繪製體時過標樣溫總長數隨機種對話務麼換開達許斷錯結顯內請無萬須見間類記來說縮後試處詳誌響應啟復頁",
)


def _traditional(text: str) -> str:
    for simplified, traditional in _WORDS.items():
        text = text.replace(simplified, traditional)
    return text.translate(_CHARACTERS)


TEXTS = {"en": ENGLISH, "zh": CHINESE, "zh-TW": {key: _traditional(text) for key, text in CHINESE.items()}}
# What browsers call the languages. The page's labels follow the browser's own list, the rest `language_of`.
LOCALES = {"zh-CN": "zh", "zh-SG": "zh", "zh-Hans": "zh", "zh-HK": "zh-TW", "zh-MO": "zh-TW", "zh-Hant": "zh-TW"}
TRADITIONAL = ("zh-tw", "zh-hk", "zh-mo", "zh-hant")


def language_of(accepted: str) -> str:
    """Choose the page's language for an Accept-Language header, by its first entry, as Gradio's labels do."""
    first = accepted.strip().lower()
    return "zh-TW" if first.startswith(TRADITIONAL) else "zh" if first.startswith("zh") else "en"


def translate(language: str, key: str, **values: object) -> str:
    """Return a text in a language, its placeholders filled in."""
    return TEXTS[language][key].format(**values)


def explain_error(language: str, error: APIError, **limits: object) -> str:
    """Explain an error of the API to a person, wholly in the page's language.

    Args:
        limits: `megabytes` and `megapixels` of a picture.
    """
    code = error.code or ""
    if code == "invalid_message" and language == "en":  # it names what is wrong
        return error.message
    if code == "bad_setting":
        setting = error.param or "seed"
        values = {"setting": translate(language, setting), "range": translate(language, f"range_{setting}")}
        return translate(language, code, **values)
    return translate(language, code if code in ENGLISH and code != "failed" else "failure", **limits)
