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

# Names of `NAMES` that are hardly ever the other gender's.
MEN: tuple[str, ...] = _words(
    """
    Aaron Adam Alan Albert Andrew Anthony Arthur Benjamin Bill Bob Brad Brian Bruce Bryan Carl Carlos Charles
    Colin Craig Daniel David Donald Doug Edward Eric Ethan Fred Gary George Greg Harold Harry Henry
    Howard Hugh Isaac Jack Jacob James Jason Jeff Jeremy Jim John Jonathan Joseph Joshua Karl Keith Kenneth
    Kevin Larry Louis Luke Martin Matt Matthew Michael Mike Nathan Neil Nick Oliver Oscar Patrick Paul
    Peter Philip Ralph Richard Robert Roger Ron Ross Russell Samuel Scott Simon Stanley Stephen Steve Steven
    Stuart Thomas Tim Timothy Todd Tom Tony Victor Vincent Walter Wayne William
    """
)

WOMEN: tuple[str, ...] = _words(
    """
    Alice Amanda Amy Angela Anna Anne Barbara Beth Carol Caroline Catherine Charlotte Christina Claire Deborah
    Diana Dorothy Elizabeth Emily Emma Eva Hannah Heather Helen Jane Janet Jennifer Jenny Jessica Joan Julia
    Julie Karen Kate Katherine Laura Lauren Linda Lisa Louise Lucy Margaret Maria Marie Martha Mary Melissa
    Michelle Nancy Nicole Nina Pamela Patricia Rachel Rebecca Ruth Samantha Sandra Sara Sarah Sophia Stephanie
    Susan Teresa Vera Victoria Wendy
    """
)

# They follow the article "a", so none begins with a vowel sound.
ADJECTIVES: tuple[str, ...] = _words(
    "great good nice kind lovely real true close decent brilliant wonderful fantastic proper fine rare strong"
)

ROLES: tuple[str, ...] = _words(
    """
    friend person neighbor teacher doctor student writer singer dancer leader listener colleague partner cook
    driver player worker speaker guide reader
    """
)

# Nouns with a regular plural in -s, as subject and inside "to the ..." for agreement.
SUBJECTS: tuple[str, ...] = _words(
    """
    key door letter picture book map ticket lamp chair coat computer flag guitar hammer light machine
    sign road path wall window boy girl teacher doctor student worker player driver guard farmer visitor
    neighbor friend dog cat bird horse
    """
)

ATTRACTORS: tuple[str, ...] = _words(
    """
    cabinet table house car tree garden river bridge park hotel hospital museum office farm mountain lake
    school shop station store theater tower town village building field hill island
    """
)

# Names for functions and arguments, and the words of docstrings.
ARGUMENTS: tuple[str, ...] = _words(
    """
    action address amount area bank base battle block board body book border box branch building camp card
    case center channel chart class club code color column computer content control core cost count crime
    crisis culture data date degree design detail device disease door drive effect energy engine event
    exchange failure family field figure file film filter fire flag floor food force form frame game goal
    ground group growth hand health history host house image index industry input island item key label land
    language layer length letter level light limit line list load loss machine market mass match media member
    memory message method metal mode model mouth music name nation network node note object oil option order
    output page paper parent part party path pattern piece place plan plant player point policy port power
    pressure price process product project quality question range rate reason record region report resource
    response result river road role room route rule sample scale school score screen season section sense
    series service shape shop signal size skill source space speed stage state station step stock store story
    street style subject surface symbol system table target task team term test text theory ticket title tool
    town track trade tree type unit user value version video view volume wall war water wave weight window
    wood word world year youth zone
    """
)
