"""Stories about eight animals: the text that train_tiny.py learns from.

SPDX-License-Identifier: Apache-2.0 AND CC0-1.0

Every sentence here was written for this repository, and all of it is dedicated
to the public domain under CC0 1.0 (creativecommons.org/publicdomain/zero/1.0).

A story is a plot (a list of slots, each with several wordings of one step),
filled in with two animals, a place, the weather and a few things. There are far
more stories than a small model could learn by heart, so it has to learn who is
in the story and what comes next. `python stories.py` prints a few.
"""

import random

# name, animal, subject pronoun, object pronoun, possessive, home
ANIMALS = [
    ("Fern", "fox", "she", "her", "her", "den under the oak"),
    ("Otto", "owl", "he", "him", "his", "hollow tree"),
    ("Hazel", "hedgehog", "she", "her", "her", "nest of leaves"),
    ("Pip", "mouse", "he", "him", "his", "house in the wall"),
    ("Bramble", "badger", "he", "him", "his", "deep, warm burrow"),
    ("Willow", "otter", "she", "her", "her", "house by the river"),
    ("Clover", "rabbit", "she", "her", "her", "burrow on the hill"),
    ("Moss", "tortoise", "he", "him", "his", "corner of the garden"),
]

PLACES = [
    ("the old mill", "the wheel turned slowly in the water"),
    ("the river", "the water was clear and cold"),
    ("the green hill", "you could see the whole valley"),
    ("the apple garden", "the grass was full of red apples"),
    ("the stone bridge", "small fish swam in the shade"),
    ("the dark wood", "the trees stood close together"),
    ("the pond", "the frogs sat on their leaves"),
    ("the market", "there were baskets on every table"),
]

TIMES = [
    "One rainy morning",
    "One sunny morning",
    "On a windy day in spring",
    "On a quiet summer evening",
    "One cold day in winter",
    "Late one autumn afternoon",
    "Early one morning",
    "On the first day of spring",
]

# fmt: off
THINGS = ["red scarf", "blue kite", "little bell", "brass key", "warm hat",
          "wooden spoon", "round lamp", "yellow boat"]
FOODS = ["apple pie", "honey cake", "carrot soup", "nut bread", "berry jam",
         "plum tart"]
FINDS = ["under the bed", "behind the door", "on top of the shelf",
         "in the tall grass", "inside the teapot", "at the bottom of the basket"]
NOISES = [("a loose gate", "tap, tap, tap"), ("a cricket", "creak, creak"),
          ("the old kettle", "hum, hum"), ("a branch in the wind", "knock, knock"),
          ("a sleepy frog", "croak, croak")]
SKILLS = [("swim", "the water"), ("climb a tree", "the tall tree"),
          ("sing", "the song"), ("row a boat", "the boat"),
          ("read a map", "the map"), ("whistle", "the tune")]
SEEDS = ["bean", "sunflower seed", "pumpkin seed", "acorn", "apple seed"]

# A plot is a list of slots; a slot is a list of wordings of one step.
LOST = [
    ["{time}, {A} the {a} could not find {his} {thing}.",
     "{time}, {A} the {a} woke up and saw that {his} {thing} was gone.",
     "{A} the {a} had a {thing}, and {he} loved it very much. {time}, it was gone."],
    ["{He} looked in {his} {home}, but it was not there.",
     "{He} looked in every pocket and every box, but it was not there.",
     "First {he} looked at home, and then {he} looked outside."],
    ["So {he} walked to {place}, where {view}.",
     "Then {he} remembered that {he} had been at {place}, so {he} went there."],
    ['There {he} met {B} the {b}. "What are you looking for?" asked {B}.',
     '{B} the {b} was sitting there. "You look sad," said {B}. "What is wrong?"'],
    ['"I have lost my {thing}," said {A}.',
     '"My {thing} is gone," said {A}, "and I have looked everywhere."'],
    ['"Two can look better than one," said {B}. "I will help you."',
     '"Do not worry," said {B}. "We will find it together."'],
    ["They looked for a long time. They looked high and they looked low.",
     "They looked under the stones and behind the trees.",
     "They asked the birds, and they asked the bees, but nobody had seen it."],
    ["At last {B} found the {thing} {find}.",
     'Then {B} began to laugh. The {thing} was {find}!',
     "When the sun was low, they found the {thing} {find}."],
    ['"Thank you!" said {A}, and they had some {food} together.',
     '{A} was so happy that {he} danced. "Come to my house," {he} said, "and we '
     'will eat {food}."',
     "{A} hugged {his} friend, and they walked home side by side."],
]
BRIDGE = [
    ["{time}, a great storm came, and the wind blew all night.",
     "{time}, it rained so hard that the river came over its banks."],
    ["When the rain stopped, the little bridge was broken.",
     "In the morning the little bridge was gone."],
    ["{A} the {a} stood on one side, and {B} the {b} stood on the other.",
     '"Oh no," said {A} the {a}. {His} friend {B} the {b} lived on the other side.'],
    ['"How can we meet now?" called {A}.', '"I cannot come to you!" called {A}.'],
    ['"We can build a new bridge," {B} called back.',
     '{B} thought for a while. "Let us build it again," {bhe} said.'],
    ["{A} carried stones, and {B} carried wood.",
     "{A} brought long branches, and {B} tied them with rope."],
    ["They worked all day, and in the evening they were very tired.",
     "It was hard work, but nobody wanted to stop."],
    ["When the moon came up, the bridge was ready.",
     "Before it was dark, the last stone was in its place."],
    ["{A} walked over it first, slowly and carefully. It was strong.",
     "They met in the middle of the bridge and laughed."],
    ["From that day on, everybody in the valley used the new bridge.",
     "Then they sat on the bridge and ate {food} in the moonlight."],
]
BAKING = [
    ["{time}, {A} the {a} wanted to make {food}.",
     '{time}, {A} the {a} said, "Today I will make {food} for all my friends."'],
    ["But there was no honey in the house.", "But the flour box was empty.",
     "{He} had a big bowl and a wooden spoon, but {he} had no salt."],
    ["{He} took a basket and went to {place}.",
     "So {he} put on {his} hat and walked to {place}."],
    ["On the way {he} met {B} the {b}, who was carrying a heavy bag.",
     "{B} the {b} was there too, with a bag in each hand."],
    ['"Let me help you," said {A}, and {he} took one side of the bag.',
     '"That looks heavy," said {A}. "I will carry it with you."'],
    ['"You are kind," said {B}. "Take what you need from my bag."',
     '"Thank you," said {B}. "I have more than I need. Please take some."'],
    ["They went home together and made a fire.",
     "Soon they stood in the kitchen, and the fire was warm."],
    ["They mixed and they stirred, and {B} had flour on {bhis} nose.",
     "{A} stirred the bowl, and {B} sang a song about the rain."],
    ["The smell went out of the window and over the fields.",
     "When it was ready, the whole house smelled sweet."],
    ["All the animals came to eat, and not one crumb was left.",
     '"This is the best {food} in the valley," said everyone.',
     "They ate until they were full, and then they fell asleep by the fire."],
]
DARK = [
    ["{A} the {a} was afraid of the dark.",
     "Every night {A} the {a} hid {his} head, because {he} was afraid of the dark."],
    ["{time}, {he} stayed too long at {place}, and the sun went down.",
     "{time}, {he} was far from home when night came."],
    ["The shadows grew long, and {his} heart beat fast.",
     "Everything was black, and {he} could not see the path."],
    ["Then {he} saw a small light between the trees.",
     "Then a small light came over the hill."],
    ["It was {B} the {b} with a lamp.", "{B} the {b} was carrying a little lamp."],
    ['"Why are you shaking?" asked {B}.', '"Are you cold?" asked {B}.'],
    ['"I do not like the dark," said {A} in a small voice.',
     '"No," said {A}, "but the night is so big and so black."'],
    ['"Come with me," said {B}, "and I will show you something." {BHe} put out '
     "the lamp.",
     "{B} put out the lamp and pointed up. \"Look,\" {bhe} said."],
    ["Above them were a thousand stars.",
     "The sky was full of stars, and the moon was as round as a plate."],
    ['"You can only see them in the dark," said {B}.',
     '"The night is dark so that the stars can shine," said {B}.'],
    ["After that night, {A} was not afraid any more.",
     "They looked at the stars for a long time, and {A} forgot to be afraid."],
]
RACE = [
    ["{time}, the animals had a race from {place} to the big tree.",
     "{time}, there was a race, and the prize was a large {food}."],
    ["{A} the {a} was sure that {he} would win.",
     '"I am faster than the wind," said {A} the {a}.'],
    ["{B} the {b} only smiled and said nothing.",
     '"We will see," said {B} the {b}.'],
    ['"One, two, three, go!" called the birds.', "A bell rang, and they all ran."],
    ["{A} ran so fast that {he} did not look where {he} was going.",
     "{A} was soon far in front, and {he} looked back to laugh."],
    ["{He} fell over a root and hurt {his} foot.",
     "Then {he} slipped in the mud and could not get up."],
    ["{B} came by. {BHe} could have won the race, but {bhe} stopped.",
     "When {B} saw this, {bhe} stopped running at once."],
    ['"Lean on me," said {B}. "We will go together."',
     '"A friend is more than a prize," said {B}, and {bhe} helped {him} up.'],
    ["They came last, but everybody cheered.",
     "They crossed the line together, slowly, and the birds sang."],
    ['"You are the real winner," said {A}.',
     "{A} gave {B} the biggest piece of {food}."],
]
NEIGHBOUR = [
    ["{time}, there was smoke over the little house near {place}.",
     "{time}, there was a light in the empty house near {place}."],
    ["Somebody shy had come to live there, and did not talk to anyone.",
     "Nobody knew who it was. The door stayed shut all day."],
    ['"We should say hello," said {A} the {a}.',
     "{A} the {a} wanted to know who lived there."],
    ["So {he} made some {food} and put it in a basket.",
     "{He} picked a bunch of flowers and knocked on the door."],
    ["The door opened a little, and two eyes looked out. It was {B} the {b}.",
     "Slowly the door opened, and there stood {B} the {b}."],
    ['"Good day," said {A}. "I live in the {home}. This is for you."',
     '"Hello," said {A}. "I am {A}. Would you like to be my friend?"'],
    ["{B} did not know what to say. Then {bhe} smiled.",
     '"For me?" said {B} softly. "Nobody ever gave me anything before."'],
    ["They drank tea, and {B} told a story about the sea.",
     "They sat by the window and talked until the stars came out."],
    ["The next day the door of the little house was wide open.",
     "From then on, {B} waved to everyone who walked by."],
]
GARDEN = [
    ["{time}, {A} the {a} found a {seed} on the path.",
     "{time}, {B} the {b} gave {A} the {a} a {seed}."],
    ['"It is very small," said {A}. "What can I do with it?"',
     "{A} looked at it. It was no bigger than a drop of rain."],
    ['"Put it in the ground and wait," said {B}.',
     '"Small things can grow," said {B}.'],
    ["{A} dug a hole, put the {seed} in, and gave it water.",
     "So {A} planted it near {place}, where the sun was warm."],
    ["The next day {he} looked, but there was nothing to see.",
     "{He} waited one day, and two days, and three days."],
    ["{He} sang to it, and {he} told it stories, but nothing happened.",
     '"It is broken," said {A}. "Wait," said {B}.'],
    ["Then the rain came, and after the rain came the sun.",
     "A week went by, and then another week."],
    ["One morning there was a tiny green leaf.",
     "One morning {A} shouted, \"Come and look! It is growing!\""],
    ["It grew taller than {A}, and taller than {B}, and then taller than the door.",
     "Every day it was a little taller, and every day {A} gave it water."],
    ['"You were right," said {A}. "Small things can grow."',
     "In autumn there was enough for all the animals to share."],
]
BOAT = [
    ["{time}, {A} the {a} and {B} the {b} made a boat from an old box.",
     "{time}, {A} the {a} found a little boat near the river and called {B} the {b}."],
    ["They took {food} and a blanket and went down the river.",
     '"Let us see where the river goes," said {A}.'],
    ["The boat floated past {place}, and {view}.",
     "They floated under green trees, and the birds looked down at them."],
    ["{B} held the sail, and {A} looked out for stones.",
     "{A} told jokes, and {B} laughed so much that the boat rocked."],
    ["Suddenly there was a hole in the boat, and the water came in.",
     "Then the wind grew strong, and the waves grew high."],
    ['"Quick!" said {A}. "Use the teapot!"', '"Hold on!" shouted {B}.'],
    ["They threw out the water as fast as they could.",
     "They paddled with their hands until they reached the land."],
    ["They were wet from their ears to their toes, but they were safe.",
     "At last they sat on the sand, wet and cold, and looked at each other."],
    ["Then they both began to laugh, and they laughed all the way home.",
     '"Next time we will walk," said {B}, and {A} said, "Next time we will bring '
     'a bigger teapot."'],
]
QUARREL = [
    ["{A} the {a} and {B} the {b} were best friends. {time}, they had a quarrel.",
     "{time}, {A} the {a} and {B} the {b} both wanted the same {thing}."],
    ['"It is mine!" said {A}. "No, it is mine!" said {B}.',
     '"I saw it first," said {A}. "But I picked it up," said {B}.'],
    ["{A} went home and shut the door. {B} went home and shut the door too.",
     "They turned around and walked away, one to the left and one to the right."],
    ["{A} sat in {his} {home} and felt cross. Then {he} felt sad.",
     "All afternoon {A} played alone, but it was not fun."],
    ['"A {thing} cannot talk to me," {he} thought. "It cannot laugh with me."',
     '"I miss my friend," {he} said to the wall.'],
    ["So {he} took the {thing} and went to find {B}.",
     "In the evening {he} made some {food} and walked to {place}."],
    ["Halfway there {he} met {B}, who was coming the other way.",
     "{B} was already there, looking at the ground."],
    ['"I am sorry," they said, both at the same time.',
     '"I am sorry," said {A}. "I am sorry too," said {B}.'],
    ["After that, {A} had the {thing} on Mondays and {B} had it on Tuesdays.",
     "They shared the {thing}, and that was better than having it alone."],
]
SNOW = [
    ["One cold day in winter, the snow was so deep that {A} the {a} could not open "
     "the door.",
     "One winter morning, everything was white, and the pond was frozen."],
    ["{A} the {a} pushed and pushed, and at last {he} was outside.",
     "{A} the {a} put on a thick coat and went out."],
    ["There was no smoke from the house of {B} the {b}.",
     '"I have not seen {B} the {b} for three days," {he} said.'],
    ["{He} knocked on the door. A weak voice said, \"Come in.\"",
     "{He} walked through the snow to see what was wrong."],
    ["{B} was in bed with a bad cold and a red nose.",
     "{B} was ill, and there was no wood for the fire."],
    ["{A} carried wood from {place} until the fire was big and bright.",
     "{A} made a fire and put a pot of carrot soup on it."],
    ["{B} ate three bowls of soup and felt a little better.",
     '"Drink this," said {A}, "and then sleep." {B} slept all day.'],
    ["{A} stayed until the snow began to melt.",
     "Every day {A} came back with soup and a new story."],
    ["When spring came, {B} brought {A} the first flower of the year.",
     '"You are a good friend," said {B}. "So are you," said {A}.'],
]
LEARN = [
    ["{A} the {a} could not {skill}.",
     "All the other animals could {skill}, but {A} the {a} could not."],
    ["{time}, {he} went to {place} to try, but it went wrong.",
     "{time}, {he} tried and tried, and it went wrong every time."],
    ['"I will never learn it," said {A}, and {he} sat down on a stone.',
     "{He} was angry with {skillthing}, and {he} was angry with {him}self."],
    ["{B} the {b} was watching. \"May I show you something?\" {bhe} asked.",
     '"I said that too, when I was small," said {B} the {b}.'],
    ['"Start slowly," said {B}. "First do the easy part."',
     '"Do not look at {skillthing}," said {B}. "Look at me."'],
    ["{A} took a deep breath and tried again.",
     "They practised every morning for a week."],
    ["It was a little better. {He} tried once more, and it was better still.",
     "On the first day it was bad, and on the last day it was good."],
    ['"I can do it!" shouted {A}. "I can {skill}!"',
     "And then, all at once, {A} could {skill}."],
    ["Now, when somebody small is sad at {place}, {A} goes and helps.",
     "{B} smiled. \"Now you can teach somebody else,\" {bhe} said."],
]
NOISE = [
    ["In the middle of the night, {A} the {a} heard a strange noise.",
     "{time}, {A} the {a} was in bed when {he} heard a strange noise."],
    ['"{Noise}," it went. "{Noise}."', 'It went "{noise}", and then it stopped.'],
    ["{He} pulled the blanket over {his} head, but {he} could still hear it.",
     "{He} sat up and lit the lamp. There was nobody in the room."],
    ["So {he} ran to {B} the {b} and knocked on the window.",
     "{He} did not want to be alone, so {he} went to get {B} the {b}."],
    ['"There is a monster near {place}!" said {A}.',
     '"Something big is making a noise," said {A}.'],
    ['"Let us go and look," said {B}. "A noise is only a noise."',
     "{B} took a stick and a lamp. \"Stay behind me,\" {bhe} said."],
    ["They walked on the tips of their toes. The noise grew louder.",
     "Step by step they came closer, and their hearts beat fast."],
    ["It was only {noisething}!", "They looked, and there was {noisething}."],
    ["They laughed until they cried, and then they drank hot milk.",
     '"That was a very small monster," said {B}.'],
    ["{A} slept well that night, and so did {noisething}.",
     "After that, {A} liked to hear the noise, because {he} knew what it was."],
]
PLOTS = [LOST, BRIDGE, BAKING, DARK, RACE, NEIGHBOUR, GARDEN, BOAT, QUARREL,
         SNOW, LEARN, NOISE]
# fmt: on


def words_for(rng: random.Random) -> dict[str, str]:
    """Chooses who and what one story is about."""
    (a, b) = rng.sample(ANIMALS, 2)
    place, view = rng.choice(PLACES)
    noise_thing, noise = rng.choice(NOISES)
    skill, skill_thing = rng.choice(SKILLS)
    # fmt: off
    return {
        "A": a[0], "a": a[1], "he": a[2], "him": a[3], "his": a[4], "home": a[5],
        "He": a[2].capitalize(), "His": a[4].capitalize(),
        "B": b[0], "b": b[1], "bhe": b[2], "bhis": b[4], "BHe": b[2].capitalize(),
        "place": place, "view": view, "time": rng.choice(TIMES),
        "thing": rng.choice(THINGS), "food": rng.choice(FOODS),
        "find": rng.choice(FINDS), "noise": noise,
        "Noise": noise.capitalize(), "noisething": noise_thing,
        "skill": skill, "skillthing": skill_thing, "seed": rng.choice(SEEDS),
    }
    # fmt: on


def story(rng: random.Random, plot: list[list[str]]) -> str:
    """Fills in one plot."""
    words = words_for(rng)
    sentences = [rng.choice(slot).format(**words) for slot in plot]
    text = " ".join(sentences)
    # "a acorn" and the like: the one thing the slots cannot know.
    for vowel in "aeiou":
        text = text.replace(f" a {vowel}", f" an {vowel}")
    return text[0].upper() + text[1:]


def compose(count: int, seed: int) -> list[str]:
    """Writes `count` stories, every plot equally often, always the same ones."""
    rng = random.Random(seed)
    stories = [story(rng, PLOTS[i % len(PLOTS)]) for i in range(count)]
    rng.shuffle(stories)
    return stories


if __name__ == "__main__":
    print("\n\n".join(compose(count=len(PLOTS), seed=0)))
