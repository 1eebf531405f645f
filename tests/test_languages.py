"""Spellings of a language that resolve to Whisper's code, names that do not, and the adapter that each is for."""

import pytest
from langcodes import Language
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

from peft_clsr import CLSRConfig, adapter_of_language, inference_adapter, language_code

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
ANY = CLSRConfig()


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


# In training


@pytest.mark.parametrize("language", ["ca", "cat", "ca_es", "Catalan", "<|ca|>"])
@pytest.mark.parametrize(
    ("adapters", "name"),
    [
        ({"uk": ANY, "ca": ANY}, "ca"),
        ({"uk": ANY, "mine": CLSRConfig(language="ca")}, "mine"),
        ({"uk": ANY, "catalan": ANY}, "catalan"),
        ({"default": ANY}, "default"),
    ],
)
def test_training_takes_the_adapter_of_a_language(adapters, name, language):
    assert adapter_of_language(adapters, language) == name


def test_training_takes_an_adapters_name_before_its_language():
    assert adapter_of_language({"ca": ANY, "ca_valencia": ANY}, "ca_valencia") == "ca_valencia"


@pytest.mark.parametrize(
    ("adapters", "has"),
    [
        ({"uk": ANY}, "no adapter"),
        ({"mine": CLSRConfig(language="uk")}, "no adapter"),
        ({"default": ANY, "uk": ANY}, "no adapter"),
        ({"a": CLSRConfig(language="ca"), "ca_es": ANY}, "several adapters"),
    ],
)
def test_training_wants_one_adapter_for_a_language(adapters, has):
    with pytest.raises(ValueError, match=f"'ca' has {has} on the model .*{', '.join(adapters)}"):
        adapter_of_language(adapters, "ca")


# In inference

TWO = {"a": CLSRConfig(language="ca"), "b": CLSRConfig(language="ca"), "uk": ANY, "default": ANY}


@pytest.mark.parametrize(
    ("adapters", "language", "active", "name"),
    [
        # the active one, if it is of the language
        (TWO, "ca", "b", "b"),
        ({"ca": ANY, "mine": CLSRConfig(language="ca")}, "ca", "mine", "mine"),
        ({"ca": ANY, "ca_valencia": ANY}, "ca", "ca_valencia", "ca_valencia"),
        # the one of its name
        ({"ca": ANY, "mine": CLSRConfig(language="ca")}, "ca", "ca", "ca"),
        ({"ca": ANY, "mine": CLSRConfig(language="ca"), "uk": ANY}, "ca", "uk", "ca"),
        ({"xx": ANY, "uk": ANY}, "xx", "uk", "xx"),
        ({"xx": ANY, "uk": ANY}, "xx", None, "xx"),
        # the only one of it
        ({"mine": CLSRConfig(language="ca"), "uk": ANY}, "ca", "uk", "mine"),
        ({"ca_es": ANY, "default": ANY}, "ca", "default", "ca_es"),
        ({"jv": ANY, "uk": ANY}, "jw", None, "jv"),
        # the active one, if it is for no language in particular
        (TWO, "ro", "default", "default"),
        (TWO, "xx", "default", "default"),
        # else the base
        (TWO, "ro", "uk", None),
        (TWO, "ro", None, None),
        (TWO, "xx", "uk", None),
        ({"mine": CLSRConfig(language="ca")}, "uk", "mine", None),
        ({"default": ANY}, "ca", None, None),
        ({}, "ca", None, None),
    ],
)
def test_inference_routes_by_the_adapter_of_a_language_else_by_the_base(adapters, language, active, name):
    assert inference_adapter(adapters, language, active) == name


@pytest.mark.parametrize("active", ["uk", "default", None])
def test_inference_does_not_choose_among_several_adapters_of_a_language(active):
    with pytest.raises(ValueError, match=r"'ca' has several adapters on the model \(a, b\).*model.set_adapter\('a'\)"):
        inference_adapter(TWO, "ca", active)
