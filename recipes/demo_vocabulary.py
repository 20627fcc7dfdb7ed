"""The words that `make_demo_data` combines: people, goods, tools with their rules, terms with their meaning."""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

# fmt: off
PEOPLE = (
    "Abena Mensah", "Ada Kowalska", "Aiko Tanaka", "Amir Haddad", "Anouk Visser", "Bao Nguyen", "Bruno Ferrari",
    "Carmen Ortiz", "Chidi Okafor", "Dilek Aydin", "Einar Solberg", "Elif Demir", "Emeka Obi", "Farah Qureshi",
    "Greta Lindholm", "Hana Novak", "Hugo Laurent", "Ines Duarte", "Ivo Petrov", "Jonas Weber", "Kamala Rao",
    "Kofi Asante", "Lea Brunner", "Liam Doyle", "Lucia Romero", "Mara Lindqvist", "Mateo Silva", "Mina Park",
    "Nadia Rahimi", "Noor Ali", "Olga Sidorova", "Oskar Nyman", "Pia Keller", "Priya Nair", "Rafael Costa",
    "Rosa Almeida", "Samir Khoury", "Sofia Rossi", "Tariq Aziz", "Tomas Horak", "Uma Iyer", "Vera Popescu",
    "Wanjiru Kamau", "Yara Costa", "Yusuf Kaya", "Zoe Martin",
)

MATERIALS = (
    "oak", "ash", "beech", "birch", "cherry", "larch", "maple", "pine", "walnut", "steel", "brass", "aluminium",
    "copper", "acrylic",
)

GOODS = (
    "bookends", "brackets", "candle holders", "coat hooks", "crates", "cutting boards", "door handles",
    "drawer fronts", "frames", "hinges", "knobs", "ladles", "letter boxes", "mallets", "name plates", "pen trays",
    "plant stands", "rulers", "serving trays", "shelves", "signs", "spacers", "spice racks", "stools", "tool boxes",
    "trestles", "trivets", "wall clocks", "wedges", "workbench vises",
)

DAYS = (
    "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday",
)
# fmt: on


class Unit(NamedTuple):
    """One conversion: a value in `source` times `factor` is a value in `target`."""

    source: str
    target: str
    factor: Fraction
    values: tuple[str, ...]
    thing: str


UNITS = (
    Unit(
        "in", "mm", Fraction("25.4"), ("0.25", "0.5", "0.75", "1.5", "2", "2.5", "3", "4.5", "6", "8", "11"), "drawing"
    ),
    Unit("ft", "cm", Fraction("30.48"), ("1", "2", "2.5", "3", "4", "5", "6", "8", "10", "12"), "tape measure"),
    Unit("yd", "m", Fraction("0.9144"), ("1", "2", "3", "5", "7", "10", "25", "40"), "cloth label"),
    Unit("lb", "kg", Fraction("0.45359237"), ("1", "2", "5", "8", "10", "12", "20", "45", "60"), "shipping label"),
    Unit("oz", "g", Fraction("28.349523125"), ("1", "2", "4", "6", "8", "12"), "wax tin"),
    Unit("gal", "L", Fraction("3.785411784"), ("1", "2", "3", "5", "10", "15"), "oil drum"),
    Unit("fl oz", "mL", Fraction("29.5735295625"), ("1", "2", "4", "8", "10", "16"), "glue bottle"),
    Unit("psi", "kPa", Fraction("6.894757"), ("15", "30", "60", "90", "100", "120"), "air gauge"),
    Unit("ft·lb", "N·m", Fraction("1.355818"), ("5", "10", "15", "20", "35", "50", "80"), "torque chart"),
    Unit("hp", "kW", Fraction("0.745700"), ("0.5", "1", "1.5", "2", "3", "5"), "motor plate"),
    Unit("m", "mm", Fraction(1000), ("0.4", "0.75", "1.2", "1.85", "2.4", "3.05"), "floor plan"),
    Unit("kg", "g", Fraction(1000), ("0.25", "0.6", "1.2", "2.5", "3.75"), "bench scale"),
    Unit("mm", "µm", Fraction(1000), ("0.02", "0.05", "0.12", "0.3", "1.6"), "feeler gauge"),
    Unit("h", "min", Fraction(60), ("0.5", "1.25", "1.5", "2", "2.75", "3.5"), "job sheet"),
    Unit("m/s", "km/h", Fraction("3.6"), ("0.5", "2", "5", "10", "12.5", "20"), "belt chart"),
    Unit("bar", "kPa", Fraction(100), ("0.5", "1.5", "2", "4", "6", "8"), "spray gun gauge"),
)

# place: the degrees Celsius that may be read there, first and last.
PLACES = {
    "kiln": (600, 1280),
    "drying oven": (60, 180),
    "hide glue pot": (50, 65),
    "paint store": (5, 30),
    "cold shed": (-30, 10),
    "tempering oven": (150, 650),
    "powder coating oven": (160, 220),
    "compressor": (20, 95),
}

# tool: (before, during, after), one is drawn from each; nothing here asks for gloves at a turning spindle.
TOOLS: dict[str, tuple[tuple[str, ...], ...]] = {
    "table saw": (
        ("set the blade one tooth above the board", "check that the riving knife is in line", "put on eye protection"),
        ("use a push stick near the blade", "stand beside the line of the cut", "keep the board flat on the fence"),
        ("wait until the blade stands still", "lower the blade below the table", "switch off at the wall"),
    ),
    "band saw": (
        ("check the blade's tension", "set the guide just above the work", "tie back sleeves and hair"),
        ("keep fingers out of the blade's line", "feed slowly round curves", "never back out of a cut at speed"),
        ("wait for the wheels to stop", "release the tension for the night", "brush the dust off the table"),
    ),
    "drill press": (
        ("clamp the work to the table", "take the chuck key out", "take off gloves and rings"),
        ("lift the bit to clear chips", "ease off as the bit breaks through", "match the speed to the bit"),
        ("stop the spindle before you reach in", "brush chips away, never by hand", "put the bit back in its case"),
    ),
    "lathe": (
        ("turn the work once by hand", "take off gloves and scarf", "lock the tailstock"),
        ("keep the rest close to the work", "start at the lowest speed", "stand out of the line of the work"),
        ("let the spindle run out", "clear swarf with a hook", "move the rest away before sanding"),
    ),
    "angle grinder": (
        ("check the disc for cracks", "set the guard between you and the disc", "put on a face shield"),
        ("hold it with both hands", "let the sparks fly away from people", "keep the angle steady"),
        (
            "let the disc stop before you lay it down",
            "unplug before a change of disc",
            "watch for embers for half an hour",
        ),
    ),
    "router": (
        ("tighten the collet on a clean shank", "unplug before a change of bit", "clamp the work down"),
        ("feed against the bit's rotation", "take shallow passes", "keep both hands on the grips"),
        ("wait for the bit to stop", "unplug and remove the bit", "empty the dust bag"),
    ),
    "belt sander": (
        ("check that the belt tracks true", "put on a dust mask", "secure the work against the stop"),
        ("keep it moving on the surface", "keep the cord behind you", "let its weight do the work"),
        ("switch off before you lift the last time", "empty the dust bag", "let the belt stop on its own"),
    ),
    "soldering iron": (
        ("open a window or start the fan", "check the stand and the sponge", "clear paper off the bench"),
        ("hold it by the handle only", "put it in its stand between joints", "wear eye protection"),
        ("switch it off and let it cool", "wash your hands", "tin the tip before it cools"),
    ),
    "heat gun": (
        ("clear away anything that burns", "check the nozzle for blockage", "choose the lowest heat that works"),
        ("keep it moving", "never look into the nozzle", "keep your free hand behind the nozzle"),
        ("stand it upright to cool", "run it cold for a minute", "unplug it when you leave"),
    ),
    "planer": (
        ("pull nails and staples first", "check the board for loose knots", "put on ear protection"),
        ("stand to the side of the board", "take one millimetre a pass", "let the rollers feed the board"),
        ("wait for the head to stop", "switch off the extraction last", "clear chips with the power off"),
    ),
    "jigsaw": (
        ("choose the blade for the material", "support both sides of the cut", "look for wires under the board"),
        ("keep the shoe flat on the work", "keep fingers off the underside", "do not force the turn"),
        ("let the blade stop before you lift it", "unplug before you change the blade", "let a hot blade cool"),
    ),
    "chisel": (
        ("sharpen it; a blunt one slips", "clamp the work", "check that the handle sits tight"),
        ("cut away from your body", "keep both hands behind the edge", "strike it with a mallet, square on"),
        ("put the guard on the edge", "lay it in the rack, edge inward", "wipe it with oil"),
    ),
    "spray booth": (
        ("start the fan first", "put on the cartridge mask", "ground the part"),
        ("keep flames and sparks away", "spray towards the filter", "keep the hose behind you"),
        ("let the fan run ten minutes more", "close the solvent cans", "put rags in the metal bin"),
    ),
    "arbor press": (
        ("centre the part under the ram", "check the plate for cracks", "put on eye protection"),
        ("keep fingers off the plate", "press slowly and evenly", "stop if the part tilts"),
        ("leave the ram down", "wipe the plate", "put the handle upright"),
    ),
    "laser cutter": (
        ("check what the material gives off; never PVC", "start the extraction", "close the lid"),
        ("stay beside it while it runs", "keep the extinguisher within reach", "never look for the beam"),
        ("wait a minute before you open the lid", "take out small offcuts", "clean the lens when it is cold"),
    ),
    "bench grinder": (
        ("ring-test the wheel", "set the rest three millimetres off the wheel", "lower the eye shield"),
        ("stand aside while it runs up", "use the face of the wheel only", "dip the steel before it turns blue"),
        ("let the wheel run out", "dress a glazed wheel", "unplug before you move the rest"),
    ),
}

TERMS = {
    "scale": "the real distance between two neighbouring codes; smaller is finer and reaches less far",
    "zero point": "the integer code that stands for the real number 0",
    "group size": "the number of weights that share one scale; smaller groups fit better and cost more bits",
    "calibration": "running a few samples through the model to find the ranges its quantizers need",
    "clipping": "cutting values beyond the range to its ends, which costs outliers and sharpens the rest",
    "rounding error": "the gap between a value and its nearest code, at most half a scale inside the range",
    "symmetric quantization": "a range centred on 0, so that the zero point is 0 and need not be stored",
    "asymmetric quantization": "a range from minimum to maximum, with a zero point that shifts the codes to fit it",
    "fake quantization": "rounding to the codes and back in floating point, so that training feels the loss of bits",
    "straight-through estimator": "the trick of treating rounding as the identity when gradients flow back",
    "quantization-aware training": "training with rounding in the forward pass, so that the weights learn to bear it",
    "post-training quantization": "choosing codes for a finished model, with calibration at most and no training",
    "NF4": "a 4-bit code of 16 levels placed where a normal distribution has its weights",
    "double quantization": "quantizing the block scales as well, which saves about 0.37 bits a weight",
    "LoRA": "a trained low-rank product added to a frozen weight",
    "QLoRA": "LoRA adapters in 16 bits on top of a frozen base stored in 4 bits",
    "PEQA": "tuning only the scales of a quantized model while its integer codes stay as they are",
    "perplexity": "the exponential of the mean loss per token; lower means less surprise",
    "KL divergence": "a measure of how far one model's next-token probabilities lie from another's",
    "absmax": "the largest magnitude in a group; divided by the largest code it gives the scale",
    "outlier": "a value far larger than its neighbours, which stretches the scale for all of them",
    "per-channel quantization": "one scale for each output row of a weight",
    "per-token quantization": "one scale for each token's activations, found while the model runs",
    "dynamic range": "the ratio of the largest to the smallest magnitude a format can hold",
    "KV cache": "the stored keys and values of earlier tokens, which grow with every token of a chat",
    "dequantization": "the way back to real numbers: code minus zero point, times scale",
    "bf16": "a 16-bit float with the range of fp32 and 8 bits of precision",
    "gradient checkpointing": "dropping activations in the forward pass and computing them again in the backward pass",
    "bit packing": "laying several 4-bit codes side by side in one wider integer",
    "adapter": "the small set of trained weights that sits beside a frozen model",
    "codebook": "the table that turns each code into its value",
    "weight-only quantization": "integer weights with 16-bit activations, which saves memory rather than arithmetic",
}

# topic: questions about it; the bench answers none of them.
OFF_TOPIC: dict[str, tuple[str, ...]] = {
    "football": ("Who wins the cup this year?", "Was that a penalty last night?", "Which striker should we sign?"),
    "the stock market": ("Should I buy shares today?", "Which fund is safest?", "Will bitcoin go up?"),
    "medicine": ("My back hurts, what should I take?", "Is this rash serious?", "How much aspirin may I take?"),
    "the law": ("Can my landlord raise the rent?", "How do I contest a fine?", "Is this contract valid?"),
    "politics": ("Who should I vote for?", "Is the minister right?", "Which party will win?"),
    "cooking": ("How long do I boil an egg?", "Got a recipe for lentil soup?", "What goes with aubergine?"),
    "travel": ("Where should I go in May?", "Which airline is cheapest?", "Is Lisbon nice in winter?"),
    "films": ("What should we watch tonight?", "Who directed that space film?", "Is the sequel any good?"),
    "music": ("Which album should I hear first?", "Who wrote that waltz?", "Can you name this tune?"),
    "the weather": ("Will it rain tomorrow?", "How cold does it get on Sunday?", "Is a storm coming?"),
    "astrology": ("What does my sign say today?", "Are Leos and Virgos a match?", "Is Mercury in retrograde?"),
    "dating": ("How do I ask her out?", "What do I write in my profile?", "Should I text him back?"),
    "gardening": ("When do I prune roses?", "Why are my tomatoes yellow?", "How deep do I plant tulips?"),
    "history": ("Who built the pyramids?", "When did Rome fall?", "Who was the first queen of Sweden?"),
    "fashion": ("Does green suit me?", "Which shoes go with this coat?", "Are wide trousers still in?"),
    "video games": ("How do I beat the last boss?", "Which console should I get?", "Is there a cheat for level 9?"),
}

# machine: (what was done to it, ...), for the shop log.
JOBS: dict[str, tuple[str, ...]] = {
    "lathe": ("belt changed", "bearings greased", "chuck cleaned", "tailstock aligned"),
    "band saw": ("blade changed", "guides adjusted", "tyres cleaned", "tension checked"),
    "planer": ("knives sharpened", "rollers waxed", "dust port cleared", "depth stop set"),
    "compressor": ("tank drained", "filter changed", "valve tested", "hose replaced"),
    "drill press": ("spindle oiled", "belt moved to slow", "table squared", "chuck replaced"),
    "laser cutter": ("lens cleaned", "mirrors aligned", "water topped up", "bed scraped"),
    "dust extractor": ("bag changed", "filter shaken out", "hose patched", "motor checked"),
    "table saw": ("fence squared", "blade sharpened", "insert replaced", "brake tested"),
    "kiln": ("shelves washed", "cone replaced", "door seal checked", "vent cleared"),
    "forklift": ("battery charged", "forks inspected", "horn repaired", "tyres checked"),
}
