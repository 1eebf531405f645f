"""Texts that error rates take for equal or different, in the scripts that Whisper writes, counted by hand."""

import unicodedata

import pytest
from transformers.models.whisper.english_normalizer import BasicTextNormalizer
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from peft_clsr import error_rates, normalize_text
from peft_clsr.evaluation.normalization import rate_to_read

# Language, spoken, heard, WER: words that differ in marks only are different, and each word is one.
MARKS = [
    ("hi", "मैं हिंदी बोलता हूँ", "मैं हिंदी बोलती हूँ", 1 / 4),
    ("hi", "दिन", "दीन", 1),
    ("mr", "काका कुठे", "काकू कुठे", 1 / 2),
    ("ne", "म घर जान्छु", "म घर जान्छौ", 1 / 3),
    ("bn", "দিন", "দান", 1),
    ("gu", "મારું નામ", "મારો નામ", 1 / 2),
    ("pa", "ਮੇਰਾ ਨਾਂ", "ਮੇਰੀ ਨਾਂ", 1 / 2),
    ("ta", "பல் கல்", "பால் கல்", 1 / 2),
    ("te", "నేను వచ్చాను", "నేను వచ్చాము", 1 / 2),
    ("kn", "ನಾನು ಹೋದೆ", "ನಾನು ಹೋದ", 1 / 2),
    ("ml", "അവൻ വന്നു", "അവൾ വന്നു", 1 / 2),
    ("si", "මම ගියා", "මම ගියේ", 1 / 2),
    ("yo", "ọkọ̀ náà", "ọkọ náà", 1 / 2),
    ("he", "שָׁלוֹם לך", "שָׁלוֹם לי", 1 / 2),
    ("he", "שָׁלוֹם", "שֵׁלוֹם", 1),
    ("ar", "كَتَبَ الولد", "كُتِبَ الولد", 1 / 2),
    ("ur", "میں گیا", "میں گئی", 1 / 2),
    ("vi", "tôi mua má", "tôi mua mà", 1 / 3),
    ("bo", "བོད", "བད", 1),
    ("am", "ሰላም ነው", "ሰላም ናት", 1 / 2),
]

# Language, and two spellings of one text.
EQUAL = [
    ("tr", "İstanbul", "istanbul"),
    ("tr", "I\u0307stanbul", "istanbul"),
    ("tr", "ISPARTA", "ısparta"),
    ("az", "İyirmi", "iyirmi"),
    ("en", "İstanbul", "istanbul"),
    ("el", "ΣΟΦΟΣ", "σοφος"),
    ("ka", "ᲐᲑᲒ", "აბგ"),
    ("uk", "п’ять", "п'ять"),
    ("uk", "пʼять", "п`ять"),
    ("be", "сям‘я", "сям'я"),
    ("uz", "oʻzbek togʻ", "o'zbek tog'"),
    ("br", "c’hoar", "c'hoar"),
    ("haw", "ʻokina Hawaiʻi", "'okina Hawai'i"),
    ("mt", "ta’", "ta'"),
    ("en", "‘Hello,’ he said", "Hello he said"),
    ("ca", "l’home", "l'home"),
    ("ca", "col·laborar", "col•laborar"),
    ("ca", "co\u0140laborar", "col·laborar"),
    ("he", 'צה"ל', "צה״ל"),
    ("hy", "ինչո՞ւ", "ինչու"),
    ("ml", "അവന്\u200d", "അവൻ"),
    ("ar", "مـــدرسة", "مدرسة"),
    ("am", "ሰላም፡ነው።", "ሰላም ነው"),
    ("hi", "राम आया।", "राम आया"),
    ("he", "\u200fשלום\u200e", "שלום"),
    ("de", "\ufeffDonau\u00addampf", "Donaudampf"),
    ("ar", "\u202bسلام\u202c", "سلام"),
    ("en", "hel\u200dlo", "hello"),
    ("en", "well\u2011known", "well-known"),
    ("en", "I ❤\ufe0f you 1\ufe0f\u20e3", "I you 1"),
    ("ja", "ｶﾀｶﾅ", "カタカナ"),
    ("ja", "はい、そうです。", "はいそうです"),
    ("ja", "ラーメン 二つ", "ラーメン二つ"),
    ("zh", "你好，世界。今天天气很好！", "你好世界今天天气很好"),
    ("zh", "我有3个苹果", "我有 3 个苹果"),
    ("zh", "我用（音乐）iPhone", "我用 iphone"),
    ("zh-TW", "你 好", "你好"),
    ("yue", "佢哋，好！", "佢哋好"),
    ("th", "สวัสดี ครับ", "สวัสดีครับ"),
    ("th", "สวัสดี\u200bครับ", "สวัสดีครับ"),
    ("lo", "ສະບາຍ ດີ", "ສະບາຍດີ"),
    ("my", "မင်္ဂလာပါ။", "မင်္ဂလာပါ"),
    ("km", "សួស្តី\u200bអ្នក។", "សួស្តីអ្នក"),
    ("bo", "བཀྲ་ཤིས།", "བཀྲ ཤིས"),
    ("ko", "안녕, 하세요!", "안녕 하세요"),
]

# Language, text, the same with a difference that spells, and WER.
DIFFERENT = [
    ("tr", "ılık su", "ilik su", 1 / 2),
    ("fa", "می\u200cروم", "میروم", 1),
    ("si", "ක්\u200dෂ", "ක්ෂ", 1),
    ("uz", "togʻ", "tog", 1),
    ("haw", "ʻau", "au", 1),
    ("uk", "м'ята трава", "мята трава", 1 / 2),
    ("ja", "ビル", "ビール", 1),
    ("ja", "人々", "人", 1),
    ("th", "เร็วๆ", "เร็ว", 1),
    ("ko", "안녕 하세요", "안녕하세요", 1),
    ("ml", "ൻ", "ൺ", 1),
]


@pytest.mark.parametrize("language, spoken, heard, wer", MARKS + DIFFERENT)
def test_marks_and_letters_distinguish_words(language, spoken, heard, wer):
    assert error_rates([heard], [spoken], language=language)[language]["wer"] == pytest.approx(wer)
    assert error_rates([spoken], [spoken], language=language)[language]["cer"] == 0


@pytest.mark.parametrize("language, one, other", EQUAL)
def test_case_punctuation_and_invisible_characters_do_not_count(language, one, other):
    assert normalize_text(one, language) == normalize_text(other, language) != ""
    rates = error_rates([other], [one], language=language)[language]
    assert rates["wer"] == rates["cer"] == 0


@pytest.mark.parametrize("language, spoken", [(language, spoken) for language, spoken, *_ in MARKS])
def test_words_stay_whole(language, spoken):
    spaces = 0 if rate_to_read(language) == "cer" else spoken.count(" ")
    assert normalize_text(spoken, language).count(" ") == spaces


def test_canonically_equivalent_texts_are_equal():
    for language, text, *_ in MARKS + EQUAL + DIFFERENT:
        composed, decomposed = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
        assert normalize_text(composed, language) == normalize_text(decomposed, language), text


def test_texts_without_apostrophes_and_loose_marks_are_as_the_old_normalizer_had_them():
    old = BasicTextNormalizer(remove_diacritics=False)
    texts = [
        "Bună ziua, ce mai faceți? Mâncați [râde] bine (aplauze)!",
        "Съешь ещё этих мягких французских булок, да выпей чаю.",
        "Η γρήγορη αλεπού — «πηδάει» πάνω από τον σκύλο;",
        "Well-known: 3,5 % of 1/2; e-mail me@example.org <b>bold</b> ½ №5 A&B",
        "Ça va? Où est l'été... ŒUVRE Ñandú ¿qué? ĳ ﬁn Ⅷ",
        "",
        "♪ ♪",
    ]
    for text in texts:
        assert normalize_text(text.replace("l'", "l "), "fr") == old(text.replace("l'", "l ")).strip()


def test_chinese_japanese_and_languages_like_them_are_read_by_characters():
    by_characters = {language for language in LANGUAGES if rate_to_read(language) == "cer"}
    assert by_characters == {"zh", "yue", "ja", "th", "lo", "my", "km", "bo"}


def test_normalizing_twice_changes_nothing():
    for language, text, *_ in MARKS + EQUAL + DIFFERENT:
        once = normalize_text(text, language)
        assert normalize_text(once, language) == once
