"""The words the built-in generators draw from. Each list is filtered by the model's tokenizer first."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES: tuple[str, ...] = _words(
    """
    Aaron Adam Alan Albert Alex Alice Alison Amanda Amy Andrea Andrew Angela Anna Anne Anthony Arthur
    Barbara Ben Benjamin Beth Bill Bob Brad Brandon Brian Bruce Bryan Carl Carlos Carol Caroline Catherine
    Charles Charlotte Chris Christina Claire Colin Craig Dan Daniel David Dean Deborah Dennis Diana Donald
    Dorothy Doug Edward Elizabeth Emily Emma Eric Ethan Eva Evan Frances Francis Fred Gary George Gordon
    Greg Hannah Harold Harry Heather Helen Henry Howard Hugh Ian Isaac Jack Jacob James Jamie Jane Janet
    Jason Jeff Jennifer Jenny Jeremy Jerry Jessica Jim Joan Joe Joel John Jonathan Joseph Joshua Julia
    Julian Julie Karen Karl Kate Katherine Keith Kelly Kenneth Kevin Kim Kyle Larry Laura Lauren Lee Leo
    Leon Lewis Linda Lisa Louis Louise Lucas Lucy Luke Margaret Maria Marie Martha Martin Mary Matt Matthew
    Max Melissa Michael Michelle Mike Nancy Nathan Neil Nicholas Nick Nicole Nina Oliver Oscar Pamela Patricia
    Patrick Paul Peter Philip Rachel Ralph Ray Rebecca Richard Rob Robert Roger Ron Ross Roy Russell Ruth
    Ryan Sam Samantha Samuel Sandra Sara Sarah Scott Sean Simon Sophia Stanley Stephanie Stephen Steve
    Steven Stuart Susan Ted Teresa Thomas Tim Timothy Todd Tom Tony Tyler Vera Victor Victoria Vincent
    Walter Warren Wayne Wendy William Zach
    """
)

PLACES: tuple[str, ...] = _words(
    """
    airport bakery bank bar beach bridge cafe camp castle church cinema clinic club college concert court
    farm festival forest garden gym harbor hospital hotel house lake library mall market meeting mountain
    museum office park party playground pool port restaurant river school shop stadium station store theater
    tower town village wedding zoo
    """
)

# Every object follows the article "a", so none begins with a vowel sound.
OBJECTS: tuple[str, ...] = _words(
    """
    bag ball banana basket bike blanket book bottle bowl box bracelet cake camera candle candy card chair
    coat coin computer cookie cup dollar drink flag flower gift glass guitar hammer hat jacket key kiss
    knife lamp letter map mask necklace newspaper note painting pen pencil phone photo picture pillow
    plate present ring rope sandwich shirt spoon sword ticket tool toy watch
    """
)

# Things that last for years, for "The {NOUN} lasted from the year ...".
NOUNS: tuple[str, ...] = _words(
    """
    affair alliance argument assault attack battle blockade boom boycott campaign case challenge chaos
    collapse competition conflict conquest conspiracy construction controversy cooperation crisis crusade
    debate decline deployment development disaster dispute drought dynasty effort embargo emergency empire
    epidemic era exchange expansion expedition experiment famine feud fight friendship government hunt
    improvement inquiry insurgency invasion investigation investment journey kingdom marriage migration
    mission movement negotiation occupation operation outbreak partnership peace pilgrimage plague plan plot
    practice process program progress project protest quarrel rebellion recession recovery reform regime
    reign renovation research restoration revolt revolution rivalry rule search settlement siege slavery
    strike struggle study survey test tour trade tradition transformation treaty trial truce uprising venture
    voyage war work
    """
)
