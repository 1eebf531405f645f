"""Normalized transcripts. Each case was made by hand, by the rules of its script and language."""

import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

from peft_clsr import error_rates
from peft_clsr.evaluation.normalization import leading_rate, normalize_text

ZWNJ, ZWJ = "\u200c", "\u200d"

# Language, spoken, heard, and the word error rate.
MARKS = [
    ("hi", "मैं हिंदी बोलता हूँ", "मैं हिंदी बोलती हूँ", 1 / 4),  # I speak: he, she
    ("hi", "दिन", "दीन", 1),  # day, poor
    ("ne", "नेपाल राम्रो छ", "नेपाल राम्रै छ", 1 / 3),
    ("gu", "કમ પાણી", "કામ પાણી", 1 / 2),  # few, work
    ("ta", "பல் கல்", "பால் கல்", 1 / 2),  # tooth, milk
    ("te", "పాలు నీళ్లు", "పూలు నీళ్లు", 1 / 2),  # milk, flowers
    ("bn", "দিন", "দান", 1),  # day, gift
    ("yo", "ọkọ̀ náà", "ọkọ náà", 1 / 2),  # vehicle, husband
    ("he", "שָׁלוֹם לך", "שָׁלוֹם לי", 1 / 2),
    ("ar", "كَتَبَ الدرس", "كُتِبَ الدرس", 1 / 2),  # wrote, was written
    ("vi", unicodedata.normalize("NFD", "Tiếng Việt"), "tiếng việt", 0),
    ("ko", unicodedata.normalize("NFD", "한국어 사랑"), "한국어 사람", 1 / 2),  # love, person
]
CASE = [
    ("tr", "İstanbul IŞIK", "istanbul ışık", 0),
    ("tr", "I", "i", 1),
    ("az", "İLK QIZ", "ilk qız", 0),
    ("tr", "I\u0307yi", "iyi", 0),  # İ in two characters
    ("en", "İstanbul is big", "istanbul is big", 0),
    ("lt", "Ji\u0307\u0301", "ji\u0301", 0),  # the dot that Lithuanian keeps under an accent
    ("ka", "ᲗᲑᲘᲚᲘᲡᲘ", "თბილისი", 0),
    ("hy", "Եվ ԵՐԵՎԱՆ", "և Երևան", 0),
    ("el", "Ο ΟΔΥΣΣΕΑΣ, ΕΔΩ", "ο οδυσσεας εδω", 0),
    ("de", "ＷＥＩẞ", "weiß", 0),
]
APOSTROPHES = [
    ("uk", "п’ять яблук", "п'ять груш", 1 / 2),
    ("uk", "м`ята", "мʼята", 0),
    ("uk", "п'ять", "п ять", 2),
    ("be", "аб’ява", "аб＇ява", 0),
    ("uz", "oʻzbek tog‘", "o'zbek tog’", 0),
    ("uz", "tog‘", "tog", 1),  # a letter at a word's end
    ("uz", "'salom'", "salom", 0),
    ("br", "c’hoar", "c'hoar", 0),
    ("br", "ar c’hoar", "ar choar", 1 / 2),
    ("haw", "ʻōlelo Hawaiʻi", "‘ōlelo hawai'i", 0),
    ("haw", "ʻaʻole", "aʻole", 1),  # a letter at a word's start
    ("mt", "ta’ Malta", "ta' Malta", 0),
    ("mt", "ta’", "ta", 1),  # of, he gave
    ("sw", "ng’ombe", "ng'ombe", 0),
    ("he", "צ׳ק", "צ'ק", 0),
    ("he", "צה״ל", 'צה"ל', 0),
    ("en", "He said ‘don’t’", "he said don't", 0),
    ("en", "the dogs' bowl, rock 'n' roll", "the dogs bowl rock n roll", 0),
    ("ca", "l’home", "l'home gran", 1 / 2),  # article and noun are two words
    ("ca", "col·lecció", "coŀlecció", 0),
    ("ca", "novel·la nova", "novela nova", 1 / 2),
]
INVISIBLE = [
    ("ro", "\ufeffbună ziua", "bună ziua", 0),
    ("he", "\u200fשלום\u200e \u202aעולם\u202c", "שלום עולם", 0),
    ("ar", "\u2067مرحبا\u2069", "مـــرحبا", 0),
    ("de", "Donau\u00addampf\u200bschiff", "donaudampfschiff", 0),
    ("de", f"Auf{ZWNJ}lage", "auflage", 0),
    ("en", "a\u00a0b\u2028c ❤\ufe0f 👨\u200d👩", "a b c", 0),
    ("fa", f"می{ZWNJ}خواهم", "میخواهم", 1),
    ("fa", f"می{ZWNJ}{ZWNJ}خواهم {ZWNJ}من{ZWNJ}", f"می{ZWNJ}خواهم من", 0),
    ("fa", f"کار{ZWNJ}ها", "کارها", 0),  # after a letter that joins nothing
    ("si", f"ශ්{ZWJ}රී", "ශ්රී", 1),
    ("si", f"ල{ZWJ}ංකා", "ලංකා", 0),
    ("ml", f"അവന്{ZWJ}", "അവൻ", 0),  # the old and the new spelling of a chillu
    ("bn", f"র{ZWJ}্যাব", "র্যাব", 1),
    ("bn", f"হঠাত্{ZWJ}", "হঠাৎ", 0),
    ("hi", f"क्{ZWNJ}ष", "क्ष", 1),
]
PUNCTUATION = [
    ("am", "ሰላም፡ለዓለም።", "ሰላም ለዓለም", 0),
    ("hy", "Ինչո՞ւ, բարև՛։", "ինչու բարև", 0),
    ("hi", "नमस्ते। दुनिया॥", "नमस्ते दुनिया", 0),
    ("ur", "کیا؟ ہاں، جی۔", "کیا ہاں جی", 0),
    ("sd", "مان ۽ تون", "مان تون", 1 / 3),  # ۽ is the word "and"
    ("ro", "într-un (râs) vis [zgomot]", "într un vis", 0),
    ("all", "¨a a¨ ´b´", "a a b", 0),
    ("en", "5'000 1990’s", "5 000 1990's", 0),
]


@pytest.mark.parametrize(
    ("language", "spoken", "heard", "expected"), [*MARKS, *CASE, *APOSTROPHES, *INVISIBLE, *PUNCTUATION]
)
def test_words_are_whole_and_differ_as_readers_see_them(language, spoken, heard, expected):
    pytest.importorskip("jiwer")
    rates = error_rates([heard], [spoken], language=language)[language]
    assert rates["wer"] == pytest.approx(expected)
    assert rates["rate"] == "wer"


@pytest.mark.parametrize(
    ("language", "spoken", "heard", "expected"),
    [
        ("zh", "你好，世界。今天天气很好！", "你好世界今天天气很好", 0),
        ("zh", "我有 3 个（笑）苹果 OK", "我有３个苹果ok", 0),
        ("zh", "我有苹果", "我有平果", 1 / 4),
        ("yue", "佢哋喺度。", "佢哋 喺 道", 1 / 4),
        ("ja", "はい、そうです。", "はいそうです", 0),
        ("ja", "「コーヒー」・ﾊﾟﾝ", "コーヒーパン", 0),
        ("ja", "一ヶ月の人々", "一か月の人", 2 / 6),
        ("ja", "ビール", "ビル", 1 / 3),
        ("th", "ข้าว", "ข่าว", 1 / 4),  # rice, news
        ("th", "น้ำ ดี ๆ", "นํ้าดีๆ", 0),  # two orders of the same signs
        ("th", "ทำงาน", "ทำงาม", 1 / 5),
        ("th", "น ้ำ", "น้ำ", 0),
        ("lo", "ນ້ຳ", "ນໍ້າ", 0),
        ("lo", "ສະບາຍດີ", "ສະບາຍດ", 1 / 7),
        ("my", "စား", "စီး", 1 / 3),  # eat, ride
        ("my", "မင်္ဂလာပါ။", "မင်္ဂလာ ပါ", 0),
        ("my", "သူ၏", "သူ", 1 / 3),  # ၏ is a word, "of"
        ("km", "ភាសា\u200bខ្មែរ។", "ភាសាខ្មែរ", 0),
        ("bo", "བཀྲ་ཤིས་བདེ་ལེགས།", "བཀྲ་ཤིས་བདེ་ལེགས་", 0),
    ],
)
def test_characters_count_where_no_spaces_separate_words(language, spoken, heard, expected):
    pytest.importorskip("jiwer")
    rates = error_rates([heard], [spoken], language=language)[language]
    assert rates["cer"] == pytest.approx(expected) and rates["rate"] == "cer"
    assert rates["wer"] == (expected > 0)  # an utterance is one word


def test_the_rate_to_read_is_known_for_names_and_tags():
    by_characters = ("th", "Thai", "cmn_hans_cn", "zh-TW", "<|ja|>", "dz", "shn")
    assert [leading_rate(language) for language in by_characters] == ["cer"] * len(by_characters)
    by_words = ("ko", "korean", "vi", "kab", "en-US", "all", "", "a name")
    assert [leading_rate(language) for language in by_words] == ["wer"] * len(by_words)
    assert normalize_text("IŞIK", "tr-TR") == normalize_text("IŞIK", "Turkish") == "ışık"


@given(
    st.text(
        "abcdefghijklmnopqrstuvwxyzàéîõüçñßșțăâğøæœđłžABCZÉÑабвгдежзийёюяіїўґЙЩІЎαβγδεζηικςσωάέήόύώϊΑΒΓΔΩΆΈ0123456789"
        ' .,;:!?-–—«»"“”…()[]<>/&%$€@#*+=_\t\n½²™ﬁ№\u00a0'
    ),
    st.sampled_from(["ca", "ro", "be", "bg", "el", "en", "es", "kab"]),
)
def test_latin_cyrillic_and_greek_without_marks_and_apostrophes_are_as_whisper_published_them(text, language):
    assert normalize_text(text, language) == BasicTextNormalizer()(text).strip()


@given(st.text(), st.sampled_from(["ca", "tr", "hi", "fa", "ja", "haw", "he", "kab"]))
@example("¸´A", "tr")  # a cedilla that stands alone, and an apostrophe
@example("İ\u0307", "ca")
@example("1\u0e4d<\u0e32", "ja")  # a sign between the two parts of Thai's "am"
def test_a_normalized_text_has_single_spaces_and_stays_as_it_is(text, language):
    once = normalize_text(text, language)
    assert once == " ".join(once.split()) and normalize_text(once, language) == once
