"""Of which words and sentences are RULER's texts made? Our own lists, and the text of a user.

Answers are scored by containment, so the words that are counted must not contain each other: those listed have five
letters, and those made of two parts have eight.
"""

import random
from collections.abc import Iterator
from itertools import cycle, islice

from component.data.reader import BadRecord
from component.data.source import read_records, resolve_files
from component.error import UserError


def _split(text: str, at: str | None = None) -> list[str]:
    return text.split(at)


NOUNS = _split("""
abbey actor album altar amber ankle apple arena atlas attic bacon badge baker banjo barge basil beach bench berry
birch bison blade board bonus brain brass bread brick broom brook brush cabin cable camel canal candy canoe cedar
cello chain chair chalk chart cheek chess chest chief child cider civet clamp cliff cloak clock cloth cloud coach
coast cobra couch court crane crate cream creek crown curry daisy dance delta depot diary dough dress drill eagle
earth easel elbow ember fairy ferry fever field finch flame flask fleet flour flute frost fruit ghost glass globe
glove goose grain grape grass grove guard heart hedge heron honey horse hotel hound house hyena ivory jelly jewel
joint judge juice knife koala ladle larva laser lemon lever light lilac linen llama lodge lotus lunch manor mango
maple march marsh mayor medal melon metal model moose motel motor mount mouse mouth mural nerve night noise north
novel nurse oasis ocean olive onion opera orbit organ otter panda paper pasta patio peach pearl pedal phone piano
pilot pizza plane plant plate plaza plume poppy porch pouch prism quail queen quill radio raven ridge river robin
robot salad satin sauce scarf scene scout shark sheep shelf shell shirt shore skirt skull slate smoke snail spade
spice spine spoon spray squid stage steam steel stone stork storm stove straw sugar swamp sword syrup table thorn
tiger toast tooth torch tower trail train truck trunk tulip uncle vault verse villa viola wagon waist watch water
whale wheat wheel widow wrist yacht zebra
""")

OTHERS = _split("""
about above acorn adapt admit adopt adult after again agent agree ahead alarm alert alien alike alive allow alone along
aloud alter among anger angry annoy apart apply apron arise armor array arrow aside asset avoid award aware awful baked
basic basin basis batch beard beast begin being below blame bland blast blaze bleak blend bless blind blink block blood
bluff blunt blush boast boost booth bored bound boxer brace brake brand brawl break breed bride brief brine bring brisk
broke brown buddy build built bulky bunch burnt burst buyer cargo carry carve catch cause cease chaos charm chase cheap
check cheer chill chime choir chose chunk civic civil claim clash class clean clear clerk click climb cling clown clump
coral could count cover crack craft crash crawl crazy crisp cross crowd crude cruel crush crust cubic cycle daily dairy
dealt debut decay decor defer dense depth devil digit diner dirty ditch dizzy donor doubt dozen draft drain drama drank
dream dried drift drink drive drown dryer dwarf eager early eaten eight elder elect elite empty enemy enjoy enter entry
equal error event every exact exist extra faint faith false fancy fault favor feast fence fetch fiber fifty fight final
first fixed flash flesh flick fling float flock flood floor fluid flush focus force forge forth forty forum found frame
fresh fried front frown fully funny fuzzy gauge giant given glare gleam glide gloom glory gloss going grace grade grand
grant graph grasp grave gravy great greed green greet grief grill grind groan groom gross group growl grown guess guest
guide habit hairy handy happy hardy harsh haste hatch haunt heavy hello hence hinge hobby humor hurry ideal image imply
index inner input irony issue jeans joker juicy jumpy karma kayak kneel knock known label labor large laugh layer learn
lease least leave legal limit liver lobby local logic loose lorry lower loyal lucky lunar lyric magic major maker marry
match maybe meant media mercy merge merit merry might minor minus mixed moist money month moral movie muddy music naive
nasty naval never newly ninth noble noisy nylon occur offer often older onset other ought outer owner ozone paint panel
panic paste patch pause peace penny perch petty phase photo piece pinch pitch pivot pixel place plaid plain plead pluck
point polar pound power press price pride prime print prior prize probe proof proud prove proxy pulse punch pupil purse
quack quake query quest quick quiet quite quota quote rally ranch range rapid ratio reach react ready realm rebel refer
relax relay reply reset rhyme rider rifle right rigid rinse risky rival roast rocky rough round route royal rugby ruler
rural saint salon salty sauna scale scare scary scold scoop scope score scrap screw seize sense serve seven shade shady
shake shall shame shape share sharp shave sheet shift shine shock shoot short shout shove shown shrub shrug sight silly
since sixth sixty skate skill slack slant sleep slice slide slope small smart smash smell smile snack snake sneak sober
solar solid solve sorry sound south space spark speak speed spell spend spent spicy spill split spoil spoke sport spree
squad stack staff stain stair stale stall stamp stand stare start state steep steer stick stiff still sting stock stood
stool stoop story stout strap strip stuck study stuff stump style sunny super sweep sweet swept swift swing sworn taken
taste teach tease tempo tenth thank theft their theme there thick thief thing think third those three threw throw tidal
tight timer tired title today token topic total touch tough towel toxic trace track trade trait trash treat trend trial
tribe trick tried troop trust truth tutor twice twist ultra under union unite unity until upper upset urban usage usual
utter vague valid value vapor vigor viral virus visit vital vivid vocal voice voter waste weary weave weigh weird where
which while white whole whose width windy woman world worry worst worth would wound woven wrath wreck write wrong yield
young youth
""")

PARTS = _split("""
arch army atom aunt baby bank barn bass bath bead beak bean bear beef beet bell belt bike bird boat bolt bone book boot
bowl bulb bush cage cake calf camp cape card cart cave cell chef chin city clay clip club coal coat code coin comb cook
cork corn crab crew crow cube dawn deck deer desk dish dock doll door dove drum duck dune dust duty edge face farm fish
flag flea foam fold folk food foot fork fort frog fuel game gate gift girl glue goat gold golf gown gulf hall hand harp
hawk heel herb herd hero hill hive home hook hoop horn iron isle jail joke kelp kite knee knot lace lake lamb lamp land
lane lark leaf lens lime lion lock loft lynx mail maze meal meat menu milk mill mint mist moat mole monk moon moss moth
mule nail neck nest newt node noon nose oath oven palm park path peak pear pine pipe plow plum poem poet pond pony pool
port quiz raft rail rain reef rice ring road robe rock roof room root rope rose ruby sage sail salt sand seal seat seed
shed ship shoe shop silk sink skin sled snow soap sock sofa soil song soup star stem step stew suit surf swan tail tank
tent tide tile toad tomb tool town tree tuba tube tuna twig vase veil vest vine wall wand wasp wave weed well whip wick
wind wing wire wolf wood wool worm yard yarn yolk
""")

ADJECTIVES = _split("""
able agile amused ancient autumn awake bitter blank bold brave bright broad brown busy calm careful cheap chilly
clean clear clever coarse cold common cosy crisp curly damp daring dark deep distant dry dusty eager early easy
empty faint famous fancy fast fierce firm flat foggy fond fresh friendly frozen full gentle giant glad golden grand
grateful gray green handy happy hasty heavy hollow honest humble hungry icy idle jolly keen kind large late lazy
light little lively lonely long loud lovely loyal lucky mellow merry mighty mild modern muddy narrow neat new noble
noisy novel odd old orange pale patient plain pleasant polite proud purple quick quiet rapid rare ready red rich
ripe rough round royal rusty salty sandy secret shallow sharp shiny short shy silent silver simple sleepy slim slow
small smart smooth snowy soft solid sour spare spicy steady steep strange strong sturdy sunny sweet swift tall tame
tender thick thin tidy tiny tired tough tranquil upper useful vast violet vivid warm wary weary wide wild windy wise
witty wooden yellow young zesty
""")

VERBS = _split("""
admires avoids carries covers describes draws finds follows guards hides keeps leaves likes lifts meets misses moves
needs notices paints passes praises reaches remembers sees sells shows studies touches visits wants watches
""")

ENDINGS = _split(
    "before dawn, after dinner, in the evening, at noon, every morning, near the harbor, behind the mill, by night, "
    "in the valley, on the hill, under the bridge, without a word, with care, for no reason, once a week, again",
    ", ",
)

LISTED = NOUNS + OTHERS
WORDS = len(PARTS) ** 2 // 2  # of a number that draw_words finds without many attempts
NOISE = "The river is wide. The boats are slow. The hills are far. We walk there. We walk back again."


def draw_key(draw: random.Random) -> str:
    return f"{draw.choice(ADJECTIVES)}-{draw.choice(NOUNS)}"


def draw_words(draw: random.Random, count: int) -> list[str]:
    """`count` different words, at most WORDS: of LISTED, and of a larger count the others are made of two PARTS.

    No word contains another one, so that an answer with one of them is not taken for another. Both kinds are mixed
    evenly, and nearly the same words come first for count and count + 1.
    """
    listed = draw.sample(LISTED, len(LISTED))
    if count <= len(LISTED):
        return listed[:count]
    count, known, found = min(count, WORDS), set(LISTED), set()
    made, kinds = (random.Random(draw.random()) for _ in range(2))
    words = []
    for _ in range(count):
        if kinds.random() < len(LISTED) / count and listed:
            words.append(listed.pop())
            continue
        while (word := "".join(made.sample(PARTS, 2))) in found or any(word[at : at + 5] in known for at in range(4)):
            pass
        found.add(word)
        words.append(word)
    return words


def sentences() -> Iterator[str]:
    """Sentences without end, the same every time: the haystack if the user has none."""
    draw = random.Random("sentences")
    while True:
        first, second = draw.sample(NOUNS, 2)
        adjectives = draw.sample(ADJECTIVES, 2)
        yield f"The {adjectives[0]} {first} {draw.choice(VERBS)} the {adjectives[1]} {second} {draw.choice(ENDINGS)}."


def generated_text(words: int) -> list[str]:
    """The first `words` words of the generated sentences."""
    return list(islice((word for sentence in sentences() for word in sentence.split()), words))


LONGEST_WORD = 40  # characters, on average


def read_text(source: str, words: int) -> list[str]:
    """The first `words` words of the texts of a user, field `text`, repeated if there are fewer.

    Raises:
        UserError: the files can't be read, have a bad record, or hold no word, or texts without spaces.
    """
    found = list(islice(_words_of(source), words))
    if not found:
        raise UserError(f"--haystack: {source} holds no text; name a file of lines like " + '{"text": "..."}')
    if (mean := sum(map(len, found)) / len(found)) > LONGEST_WORD:
        raise UserError(
            f"--haystack: the words of {source} have {mean:.0f} characters on average, and prompts grow by whole "
            "words; name texts with spaces between words"
        )
    return list(islice(cycle(found), words))


def _words_of(source: str) -> Iterator[str]:
    for file in resolve_files(source, "--haystack"):
        for number, record in read_records(file, ("text",)):
            if isinstance(record, BadRecord):
                raise UserError(f"--haystack: {file}:{number}: {record.problem}; correct it, or name another file")
            yield from record["text"].split()
