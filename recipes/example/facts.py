"""The knowledge of the embedded example: well-known facts and small sums, and every way to ask for them.

A relation holds its facts and, for each language, their questions and statements. All text is written for this project.
`{s}` stands for the subject, `{v}` for the value, `{a}` and `{b}` for the terms of a sum.
"""

from dataclasses import dataclass, field

LANGUAGES = ("en", "ja")
KINDS = ("fact", "sum")
PHRASINGS = 6


@dataclass(frozen=True)
class Relation:
    """One kind of knowledge. `facts` holds (subject, value) in English and in Japanese; PHRASINGS questions a language."""

    name: str
    questions: dict[str, tuple[str, ...]]
    statements: dict[str, tuple[str, ...]]
    facts: tuple[tuple[tuple[str, str], tuple[str, str]], ...] = ()
    reply: str = "It is"  # opens an English answer


@dataclass(frozen=True)
class Item:
    """One fact or sum, which any phrasing of its relation can ask for, in both languages."""

    kind: str
    relation: Relation = field(repr=False)
    fields: dict[str, dict[str, str]]  # language -> template field -> text

    @property
    def name(self) -> str:
        """Unique over the whole example, e.g. "capital: Japan" or "sum: 3 + 4"."""
        fields = self.fields["en"]
        return f"{self.relation.name}: {fields['s'] if self.kind == 'fact' else fields['a'] + ' + ' + fields['b']}"

    def question(self, language: str, phrasing: int) -> str:
        return self.relation.questions[language][phrasing].format(**self.fields[language])

    def statement(self, language: str, form: int) -> str:
        text = self.relation.statements[language][form].format(**self.fields[language])
        return text[0].upper() + text[1:]

    def value(self, language: str) -> str:
        return self.fields[language]["v"]


def _pairs(text: str) -> tuple[tuple[tuple[str, str], tuple[str, str]], ...]:
    """Read lines of `subject = value | 主語 = 値`."""
    facts = []
    for line in text.strip().splitlines():
        english, japanese = ([part.strip() for part in side.split("=")] for side in line.split("|"))
        facts.append(((english[0], english[1]), (japanese[0], japanese[1])))
    return tuple(facts)


CAPITAL = Relation(
    "capital",
    questions={
        "en": (
            "What is the capital of {s}?",
            "Which city is the capital of {s}?",
            "Name the capital of {s}.",
            "{s} has which capital?",
            "Please tell me the capital of {s}.",
            "What do we call the capital city of {s}?",
        ),
        "ja": (
            "{s}の首都はどこですか？",
            "{s}の首都の名前は何ですか？",
            "{s}の首都を教えてください。",
            "{s}はどの都市が首都ですか？",
            "どの都市が{s}の首都でしょうか？",
            "{s}の首都といえば？",
        ),
    },
    statements={
        "en": (
            "The capital of {s} is {v}.",
            "{v} is the capital of {s}.",
            "The capital city of {s} is called {v}.",
        ),
        "ja": (
            "{s}の首都は{v}です。",
            "{v}は{s}の首都です。",
            "{s}の首都の名前は{v}といいます。",
        ),
    },
    facts=_pairs("""
        Japan = Tokyo | 日本 = 東京
        France = Paris | フランス = パリ
        Italy = Rome | イタリア = ローマ
        Spain = Madrid | スペイン = マドリード
        Germany = Berlin | ドイツ = ベルリン
        Egypt = Cairo | エジプト = カイロ
        Kenya = Nairobi | ケニア = ナイロビ
        Peru = Lima | ペルー = リマ
        Cuba = Havana | キューバ = ハバナ
        Norway = Oslo | ノルウェー = オスロ
        Greece = Athens | ギリシャ = アテネ
        Thailand = Bangkok | タイ = バンコク
        Canada = Ottawa | カナダ = オタワ
        Russia = Moscow | ロシア = モスクワ
        Austria = Vienna | オーストリア = ウィーン
        Portugal = Lisbon | ポルトガル = リスボン
    """),
)

TONGUE = Relation(
    "language",
    questions={
        "en": (
            "Which language do people speak in {s}?",
            "What language is spoken in {s}?",
            "What do they speak in {s}?",
            "Name the language of {s}.",
            "People in {s} speak which language?",
            "Please tell me the language spoken in {s}.",
        ),
        "ja": (
            "{s}では何語を話しますか？",
            "{s}で話されている言葉は何ですか？",
            "{s}の人は何語で話しますか？",
            "{s}の言葉を教えてください。",
            "{s}で使われるのは何語でしょうか？",
            "{s}の言葉といえば？",
        ),
    },
    statements={
        "en": (
            "People in {s} speak {v}.",
            "{v} is spoken in {s}.",
            "The language of {s} is {v}.",
        ),
        "ja": (
            "{s}では{v}を話します。",
            "{s}の言葉は{v}です。",
            "{v}は{s}で話されています。",
        ),
    },
    facts=_pairs("""
        Japan = Japanese | 日本 = 日本語
        France = French | フランス = フランス語
        Italy = Italian | イタリア = イタリア語
        Germany = German | ドイツ = ドイツ語
        Greece = Greek | ギリシャ = ギリシャ語
        Russia = Russian | ロシア = ロシア語
        Brazil = Portuguese | ブラジル = ポルトガル語
        Mexico = Spanish | メキシコ = スペイン語
        Egypt = Arabic | エジプト = アラビア語
        Australia = English | オーストラリア = 英語
        Thailand = Thai | タイ = タイ語
        Vietnam = Vietnamese | ベトナム = ベトナム語
        China = Chinese | 中国 = 中国語
        Turkey = Turkish | トルコ = トルコ語
    """),
)

COLOUR = Relation(
    "colour",
    questions={
        "en": (
            "What colour is {s}?",
            "Which colour does {s} have?",
            "Name the colour of {s}.",
            "Please tell me the colour of {s}.",
            "The colour of {s} is what?",
            "If you paint {s}, which colour do you take?",
        ),
        "ja": (
            "{s}は何色ですか？",
            "{s}の色は何ですか？",
            "{s}の色を教えてください。",
            "{s}はどんな色をしていますか？",
            "{s}の絵には何色を使いますか？",
            "{s}の色といえば？",
        ),
    },
    statements={
        "en": (
            "The colour of {s} is {v}.",
            "You can see that {s} is {v}.",
            "When we think of {s}, we think of {v}.",
        ),
        "ja": (
            "{s}の色は{v}です。",
            "{s}は{v}をしています。",
            "{s}を見ると{v}だとわかります。",
        ),
    },
    facts=_pairs("""
        a banana = yellow | バナナ = 黄色
        a strawberry = red | いちご = 赤色
        snow = white | 雪 = 白色
        grass = green | 草 = 緑色
        coal = black | 石炭 = 黒色
        the sky = blue | 空 = 青色
        a grape = purple | ぶどう = 紫色
        chocolate = brown | チョコレート = 茶色
        an elephant = grey | 象 = 灰色
        a lemon = yellow | レモン = 黄色
        a tomato = red | トマト = 赤色
        milk = white | 牛乳 = 白色
        a cucumber = green | きゅうり = 緑色
        a crow = black | カラス = 黒色
    """),
)

FOOD = Relation(
    "food",
    questions={
        "en": (
            "What does {s} eat?",
            "What is the food of {s}?",
            "Name the food that {s} likes.",
            "Please tell me what {s} eats.",
            "What would you feed to {s}?",
            "What does {s} like to eat?",
        ),
        "ja": (
            "{s}は何を食べますか？",
            "{s}の食べ物は何ですか？",
            "{s}の好きな食べ物は何でしょうか？",
            "{s}が食べるものを教えてください。",
            "{s}には何をあげますか？",
            "{s}の食べ物といえば？",
        ),
    },
    statements={
        "en": (
            "The food of {s} is {v}.",
            "We see that {s} likes to eat {v}.",
            "You can feed {v} to {s}.",
        ),
        "ja": (
            "{s}は{v}を食べます。",
            "{s}の食べ物は{v}です。",
            "{s}に{v}をあげます。",
        ),
    },
    facts=_pairs("""
        a panda = bamboo | パンダ = 竹
        a koala = leaves | コアラ = 葉
        a cow = grass | 牛 = 草
        a rabbit = carrots | うさぎ = にんじん
        a cat = fish | 猫 = 魚
        a monkey = bananas | 猿 = バナナ
        a squirrel = nuts | りす = 木の実
        a bee = nectar | 蜂 = 花の蜜
        a lion = meat | ライオン = 肉
        a mouse = cheese | ねずみ = チーズ
        a frog = insects | 蛙 = 虫
        a penguin = fish | ペンギン = 魚
    """),
    reply="It eats",
)

OPPOSITE = Relation(
    "opposite",
    questions={
        "en": (
            "What is the opposite of {s}?",
            "Which word is the opposite of {s}?",
            "Name the opposite of {s}.",
            "Please tell me the opposite of {s}.",
            "Not {s}, but what?",
            "If it is not {s}, what is it?",
        ),
        "ja": (
            "「{s}」の反対は何ですか？",
            "「{s}」の反対の言葉は何でしょうか？",
            "「{s}」の反対を教えてください。",
            "「{s}」と反対の意味の言葉は何ですか？",
            "「{s}」の逆は何ですか？",
            "「{s}」の反対といえば？",
        ),
    },
    statements={
        "en": (
            "The opposite of {s} is {v}.",
            "What is not {s} is {v}.",
            "The words {s} and {v} are opposites.",
        ),
        "ja": (
            "「{s}」の反対は{v}です。",
            "「{s}」の逆は{v}です。",
            "「{s}」と{v}は反対の言葉です。",
        ),
    },
    facts=_pairs("""
        big = small | 大きい = 「小さい」
        hot = cold | 暑い = 「寒い」
        high = low | 高い = 「低い」
        long = short | 長い = 「短い」
        heavy = light | 重い = 「軽い」
        new = old | 新しい = 「古い」
        bright = dark | 明るい = 「暗い」
        strong = weak | 強い = 「弱い」
        fast = slow | 速い = 「遅い」
        wide = narrow | 広い = 「狭い」
        deep = shallow | 深い = 「浅い」
        near = far | 近い = 「遠い」
        hard = soft | 硬い = 「柔らかい」
        many = few | 多い = 「少ない」
    """),
)

SUM = Relation(
    "sum",
    questions={
        "en": (
            "What is {a} + {b}?",
            "How much is {a} plus {b}?",
            "Add {a} and {b}.",
            "What do you get if you add {b} to {a}?",
            "Please tell me the sum of {a} and {b}.",
            "{a} + {b} = ?",
        ),
        "ja": (
            "{a}+{b}はいくつですか？",
            "{a}足す{b}はいくらですか？",
            "{a}に{b}を足すといくつになりますか？",
            "{a}と{b}の合計を教えてください。",
            "{a}と{b}を合わせるといくつでしょうか？",
            "{a}たす{b}は？",
        ),
    },
    statements={
        "en": (
            "{a} plus {b} is {v}.",
            "{a} + {b} = {v}",
            "The sum of {a} and {b} is {v}.",
        ),
        "ja": (
            "{a}足す{b}は{v}です。",
            "{a}と{b}の合計は{v}です。",
            "{a}に{b}を足すと{v}になります。",
        ),
    },
)

FACT_RELATIONS = (CAPITAL, TONGUE, COLOUR, FOOD, OPPOSITE)


def all_facts() -> list[Item]:
    """Every fact, in a fixed order."""
    return [
        Item("fact", relation, {"en": {"s": english[0], "v": english[1]}, "ja": {"s": japanese[0], "v": japanese[1]}})
        for relation in FACT_RELATIONS
        for english, japanese in relation.facts
    ]


def all_sums(largest_first: int, largest_second: int) -> list[Item]:
    """a + b for a in 1..largest_first and b in 1..largest_second, in order."""
    items = []
    for a in range(1, largest_first + 1):
        for b in range(1, largest_second + 1):
            fields = {"a": str(a), "b": str(b), "v": str(a + b)}
            items.append(Item("sum", SUM, {"en": fields, "ja": fields}))
    return items
