"""The words and sentences that the training text is made of; no logic. Their order is part of the seed."""

WORDS = """
apple arrow baby ball banana basket beach bear bell bird blanket boat book bottle box bread bridge brother bucket
butter button cake camera candle car carpet castle cat chair cheese cherry clock cloud coat coffee cookie corn cow
cup desk dog door dragon dream drum duck eagle earth egg elephant engine family farm feather field finger fire fish
flower forest fork fox friend frog garden gate ghost giant glass goat gold grape grass guitar hammer hand hat heart
hill honey horse house ice island jacket jar juice jungle kettle key king kite kitten knife ladder lake lamp leaf
lemon letter lion magnet map market milk mirror money monkey moon morning mountain mouse music nail nest night ocean
onion orange owl paint paper park pencil penguin piano picture pillow planet plate pocket potato puzzle queen rabbit
radio rain ring river robot rocket roof rope rose salt sand school sea shadow sheep ship shirt shoe silver sister
sky snow soap song spider spoon star stone story street sugar summer sun table tiger toast tower train tree truck
turtle umbrella valley violin wagon wall water whale wheel wind window winter wolf wood yellow zebra
""".split()  # noqa: SIM905

NAMES = """
Alice Anna Ben Carla David Emma Felix Grace Henry Ida Jack Kim Leo Lena Maria Max Mia Nina Oscar Paul Rosa Sam Tom
Zoe
""".split()  # noqa: SIM905

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()  # noqa: SIM905

MONTHS = "January February March April May June July August September October November December".split()  # noqa: SIM905

ORDINALS = "first second third fourth fifth sixth seventh".split()  # noqa: SIM905

# large unit, small unit, how many small ones make a large one, largest amount asked for
UNITS = [
    ("meters", "centimeters", 100, 99),
    ("kilometers", "meters", 1000, 99),
    ("kilograms", "grams", 1000, 99),
    ("liters", "milliliters", 1000, 99),
    ("centimeters", "millimeters", 10, 99),
    ("dollars", "cents", 100, 99),
    ("hours", "minutes", 60, 40),
    ("minutes", "seconds", 60, 40),
    ("weeks", "days", 7, 40),
]

SYSTEM_PROMPTS = [
    "You are a helpful assistant.",
    "You are tiny, a small and friendly model.",
    "Answer briefly.",
    "You are a friendly assistant who answers short questions.",
    "Be concise and correct.",
]

CAPABILITIES = (
    "I can do small tasks: add, subtract and multiply numbers, count, sort, reverse and copy lists, "
    "work with days, months and hours, and convert units. Try: Count from 3 to 30."
)

CANNOT = (
    "Sorry, I am a very small model and cannot help with that. I can only do small tasks like adding numbers, "
    "sorting lists, counting, or converting units."
)


# ways to say it, answer
SMALL_TALK = [
    (
        [
            "Hello", "Hello!", "Hi", "Hi!", "Hey", "Hey!", "Hi there", "Hello there!", "Good day!",
        ],
        "Hello! How can I help you?",
    ),
    (
        [
            "Good morning", "Good morning!",
        ],
        "Good morning! How can I help you?",
    ),
    (
        [
            "Good evening", "Good evening!",
        ],
        "Good evening! How can I help you?",
    ),
    (
        [
            "How are you?", "How are you doing?", "How is it going?", "How are you today?",
        ],
        "I am fine, thank you. What can I do for you?",
    ),
    (
        [
            "Who are you?", "What are you?", "What is your name?", "Introduce yourself.", "Tell me about yourself.",
            "Are you a robot?", "Are you an AI?", "Which model are you?", "Hello, who are you?",
            "Hi, what is your name?",
        ],
        "I am tiny, a small language model that ships inside nybble.",
    ),
    (
        [
            "Who made you?", "Who built you?", "Who trained you?", "Where do you come from?",
        ],
        "I was trained by the scripts of the nybble project.",
    ),
    (
        [
            "How big are you?", "How many parameters do you have?", "How large are you?",
        ],
        "I have about five million parameters, stored in four bits each.",
    ),
    (
        [
            "What can you do?", "What can you do for me?", "Help", "Help me", "Help me, please.", "What do you know?",
            "How can you help me?", "What are you good at?", "What should I ask you?", "What can I ask you?",
            "Can you help me?",
        ],
        CAPABILITIES,
    ),
    (
        [
            "Thanks", "Thanks!", "Thank you", "Thank you!", "Thank you very much!", "Great, thanks!",
        ],
        "You are welcome!",
    ),
    (
        [
            "Bye", "Bye!", "Goodbye", "Goodbye!", "See you later!", "Good night!",
        ],
        "Goodbye! Have a nice day.",
    ),
    (
        [
            "Yes", "Ok", "Okay", "Good", "Great!", "Nice!", "Well done!", "Cool",
        ],
        "Good! What shall I do next?",
    ),
    (
        [
            "Test", "test", "This is a test.", "Are you there?",
        ],
        "I am here. What can I do for you?",
    ),
    (
        [
            "Tell me a joke.", "Do you know a joke?", "Make me laugh.",
        ],
        "Why was six afraid of seven? Because seven ate nine.",
    ),
]  # fmt: skip

UNKNOWN = [
    "Who invented the {x}?", "Write a poem about {x}.", "What is the capital of {x}?", "Explain {x} to me.",
    "What is {x}?", "Tell me about {x}.", "How does {x} work?", "Why is {x} important?", "Write a story about {x}.",
    "Who won the {x}?", "Translate {x} into French.", "What do you think about {x}?", "Where is {x}?",
    "When did {x} begin?", "Describe {x}.", "How do I cook {x}?", "Write code for {x}.",
    "What is the meaning of {x}?", "Who is {x}?", "Give me advice about {x}.", "What is the history of {x}?",
    "Can you draw {x}?", "What is the weather in {x}?", "How old is {x}?", "Do you like {x}?",
    "Write an essay about {x}.", "Summarize {x}.", "What are the causes of {x}?", "How far away is {x}?",
    "What color is {x}?", "How do I get to {x}?", "Write a letter about {x}.", "The history of {x} is",
    "What is the population of {x}?",
]  # fmt: skip

TOPICS = [
    "France", "Germany", "Japan", "Brazil", "London", "Paris", "China", "India", "Africa", "the world cup", "the war",
    "love", "life", "physics", "history", "science", "a computer", "the internet", "Python", "machine learning",
    "a neural network", "the universe", "black holes", "gravity", "chess", "football", "music", "art",
    "the president", "Shakespeare", "Einstein", "Newton", "a good book", "this movie", "pizza", "rice", "soup",
    "dinosaurs", "the ocean", "volcanoes", "climate change", "the economy", "money", "philosophy", "happiness",
    "time travel", "my job", "my girlfriend", "a cold", "the Roman empire", "electricity", "a car engine",
    "quantum mechanics", "evolution", "mathematics", "a linked list", "the telephone", "summer",
]  # fmt: skip
