"""Spellings of a language: Whisper's code, the standard tag, and names that are neither."""

import pytest
from langcodes import Language
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

from peft_clsr import language_code, language_tag
from peft_clsr.languages.groups import related_languages
from peft_clsr.languages.tags import closest_tags, language_name, prompt_code

# The configurations of google/fleurs for languages that Whisper knows; "ca_es" where the first part is the code.
FLEURS = """
af_za am_et ar_eg as_in az_az be_by bg_bg bn_in bs_ba ca_es cs_cz cy_gb da_dk de_de el_gr en_us es_419 et_ee fa_ir
fi_fi fr_fr gl_es gu_in ha_ng he_il hi_in hr_hr hu_hu hy_am id_id is_is it_it ja_jp ka_ge kk_kz km_kh kn_in ko_kr lb_lu
ln_cd lo_la lt_lt lv_lv mi_nz mk_mk ml_in mn_mn mr_in ms_my mt_mt my_mm ne_np nl_nl oc_fr pa_in pl_pl ps_af pt_br ro_ro
ru_ru sd_in sk_sk sl_si sn_zw so_so sr_rs sv_se sw_ke ta_in te_in tg_tj th_th tr_tr uk_ua ur_pk uz_uz vi_vn yo_ng
""".split()
FLEURS_OF_OTHERS = """
ast_es ceb_ph ckb_iq ff_sn ga_ie ig_ng kam_ke kea_cv ky_kg lg_ug luo_ke nso_za ny_mw om_et or_in umb_ao wo_sn xh_za
zu_za
""".split()
NOT_LANGUAGES = [
    "default",
    "mine",
    "base",
    "test",
    "far",
    "en2",
    "ca-",
    "ca_es_",
    "",
    "_",
    "-",
    "x",
    " ca",
    "<|xx|>",
    None,
    5,
]
NAMES_LIKE_TAGS = [
    "my-model",
    "my_new",
    "my_v2",
    "my-x-model",
    "no-adapter",
    "is_best",
    "ca_a_run",
    "i-default",
    "und-ES",
]


def spellings(code):
    """The codes of ISO 639-1, 639-2/T and 639-3 (these are one), and 639-2/B of a language."""
    language = Language.get(code)
    return {code, language.language, language.to_alpha3(variant="T"), language.to_alpha3(variant="B")}


@pytest.mark.parametrize("code", LANGUAGES)
def test_iso_codes_of_each_language_resolve_in_any_writing(code):
    for spelling in spellings(code):
        for written in (spelling, spelling.upper(), f"<|{spelling}|>", f"{spelling}_ES", f"{spelling}-419"):
            assert language_code(written) == code


@pytest.mark.parametrize("name", TO_LANGUAGE_CODE)
def test_whispers_names_resolve_as_whisper_has_them(name):
    assert language_code(name) == language_code(name.title()) == TO_LANGUAGE_CODE[name]


@pytest.mark.parametrize("config", FLEURS)
def test_a_region_is_no_language(config):
    assert language_code(config) == config[:2]


@pytest.mark.parametrize(
    ("spelling", "code"),
    [
        # FLEURS
        ("cmn_hans_cn", "zh"),
        ("yue_hant_hk", "yue"),
        ("jv_id", "jw"),
        ("fil_ph", "tl"),
        ("nb_no", "no"),
        # Common Voice
        ("zh-CN", "zh"),
        ("zh-TW", "zh"),
        ("zh-HK", "zh"),
        ("sv-SE", "sv"),
        ("nn-NO", "nn"),
        ("pa-IN", "pa"),
        ("hy-AM", "hy"),
        ("ne-NP", "ne"),
        # ISO 639
        ("cat", "ca"),
        ("UKR", "uk"),
        ("ron", "ro"),
        ("rum", "ro"),
        ("cmn", "zh"),
        ("yue", "yue"),
        ("zh-yue", "yue"),
        ("arb", "ar"),
        ("swh", "sw"),
        ("nob", "no"),
        ("nno", "nn"),
        ("iw", "he"),
        ("sh", "sr"),
        ("hbs", "sr"),
        ("hrv", "hr"),
        ("bos", "bs"),
        ("ca-ES-valencia", "ca"),
    ],
)
def test_tags_resolve_to_whispers_code(spelling, code):
    assert language_code(spelling) == code
    assert language_code(spelling.swapcase().translate(str.maketrans("-_", "_-"))) == code


@pytest.mark.parametrize("language", [*NOT_LANGUAGES, *NAMES_LIKE_TAGS, *FLEURS_OF_OTHERS, "ga-IE", "gle"])
def test_what_is_no_whisper_language_is_refused_by_its_name(language):
    with pytest.raises(ValueError, match="is not a Whisper language; ") as error:
        language_code(language)
    assert repr(language) in str(error.value)


def test_a_tag_of_a_thousand_parts_is_refused():
    with pytest.raises(ValueError, match="is not a Whisper language"):
        language_code("ca" + "-valencia" * 5000)


@pytest.mark.parametrize("language", ["catalann", "Catalann", "<|catalann|>"])
def test_the_nearest_language_is_named(language):
    with pytest.raises(ValueError) as error:
        language_code(language)
    assert str(error.value) == f"language {language!r} is not a Whisper language; did you mean 'catalan' (ca)?"


# Tags


@pytest.mark.parametrize(
    ("spelling", "tag"),
    [
        *((tag, tag) for tag in ("rw", "hsb", "gsw-CH", "ca-valencia", "ary", "sr-Latn", "pt-BR", "ca-x-rural")),
        ("CA_Valencia", "ca-valencia"),
        ("sr_latn", "sr-Latn"),
        ("ca_es", "ca-ES"),
        ("cmn_hans_cn", "zh-Hans-CN"),
        ("Kinyarwanda", "rw"),
        ("română", "ro"),
        ("Ikinyarwanda", "rw"),
        ("upper sorbian", "hsb"),
        ("kin", "rw"),
        # what Whisper knows has Whisper's code
        ("Catalan", "ca"),
        ("cat", "ca"),
        ("<|ca|>", "ca"),
        ("jv", "jw"),
        ("jw", "jw"),
        ("fil", "tl"),
        ("nb", "no"),
        ("cmn", "zh"),
        ("zh-yue", "yue"),
        ("arb", "ar"),
    ],
)
def test_a_language_has_one_standard_tag(spelling, tag):
    assert language_tag(spelling) == tag
    assert language_tag(tag) == tag


@pytest.mark.parametrize("code", LANGUAGES)
def test_whispers_codes_are_tags(code):
    assert language_tag(code) == language_tag(LANGUAGES[code]) == code == prompt_code(code)


@pytest.mark.parametrize(
    "language", ["default", "mine", "my-model", "ca_es_", "", "-", "xx", "romanain", "und", "mul", None, 5]
)
def test_what_is_neither_tag_nor_name_is_refused(language):
    with pytest.raises(ValueError, match=r"is neither a language tag \(BCP 47\) nor a name") as error:
        language_tag(language)
    assert repr(language) in str(error.value)


@pytest.mark.parametrize(
    ("language", "prompt"), [("ca-valencia", "ca"), ("sr-Latn", "sr"), ("pt-BR", "pt"), ("ca-x-rural", "ca")]
)
def test_a_dialect_has_the_prompt_of_its_language(language, prompt):
    assert prompt_code(language) == prompt
    assert prompt_code(language, "Spanish") == prompt_code(language, {language: "es"}) == "es"
    assert prompt_code(language, {"rw": "sw"}) == prompt


@pytest.mark.parametrize(
    ("language", "related"),
    [("rw", "sw"), ("gsw-CH", "de"), ("ary", "ar"), ("hsb", "pl"), ("ky", "kk"), ("ast", "es"), ("hak", "zh")],
)
def test_a_language_without_a_token_needs_a_prompt_and_related_ones_are_named(language, related):
    with pytest.raises(ValueError, match=r"prompt_language='\w+'.*--prompt_language.*sounds similar") as error:
        prompt_code(language)
    assert f"{related} ({LANGUAGES[related]})" in str(error.value)
    assert prompt_code(language, related) == related


def test_related_languages_are_the_closest_first():
    assert related_languages("rw")[:3] == ["sw", "sn", "ln"]  # Bantu
    assert related_languages("gsw")[0] == "de"
    assert related_languages("qaa") == []


@pytest.mark.parametrize(
    ("language", "tags", "closest"),
    [
        ("ca", ["ca", "ca-valencia"], ["ca"]),
        ("ca-valencia", ["ca", "ca-valencia"], ["ca-valencia"]),
        ("ca-valencia", ["ca", "uk"], ["ca"]),
        ("ca", ["ca-valencia"], []),
        ("ca", ["ca-ES", "uk"], ["ca-ES"]),
        ("ca-ES", ["ca"], ["ca"]),
        ("ca-ES-valencia", ["ca", "ca-valencia"], ["ca-valencia"]),
        ("pt-BR", ["pt-PT", "pt"], ["pt"]),
        ("pt-PT", ["pt-BR"], []),
        ("sr-Latn-RS", ["sr", "sr-Latn"], ["sr-Latn"]),
        ("sr-Latn", ["sr-Cyrl", "sr"], ["sr"]),
        ("sr-Latn", ["sr-Cyrl"], []),
        ("ca-valencia", ["ca-ES"], ["ca-ES"]),
        ("fil-PH", ["tl"], ["tl"]),
        ("zh-Hans-CN", ["zh"], ["zh"]),
        ("gsw-CH", ["de", "gsw"], ["gsw"]),
        ("rw", ["sw"], []),
        ("xx", ["xx", "ca"], ["xx"]),
    ],
)
def test_the_exact_language_wins_over_a_broader_one(language, tags, closest):
    assert closest_tags(language, tags) == closest


@pytest.mark.parametrize(
    ("tag", "name"),
    [
        ("ca", "Catalan"),
        ("rw", "Kinyarwanda"),
        ("gsw-CH", "Swiss German (Switzerland)"),
        ("ca-valencia", "Catalan, valencia"),
        ("ca-FR-valencia", "Catalan (France), valencia"),
        ("sr-Latn", "Serbian (Latin)"),
        ("qaa", "Unknown language [qaa]"),
    ],
)
def test_names(tag, name):
    assert language_name(tag) == name


@pytest.mark.parametrize(("name", "code"), [("Deutsch", "de"), ("català", "ca"), ("Русский", "ru"), ("norsk", "no")])
def test_a_language_may_be_named_in_itself(name, code):
    assert language_code(name) == language_tag(name) == code
