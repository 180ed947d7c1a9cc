"""General questions whose answers an edit should not change, for users who do not provide unrelated text.

`GENERAL` is used during training. `CANARIES` is not; it is asked afterwards to detect unwanted changes.
"""

from peft_baft.data.cases import Probe, Unrelated

GENERAL = tuple(
    Unrelated(prompt, answer)
    for prompt, answer in (
        ("Water is made of hydrogen and", "oxygen"),
        ("The author of Romeo and Juliet is", "William Shakespeare"),
        ("How many days does a leap year have?", "366"),
        ("The largest planet of the solar system is", "Jupiter"),
        ("who painted the mona lisa", "Leonardo da Vinci"),
        ("Seven times eight is", "fifty-six"),
        ("Which language do most people in Brazil speak?", "Portuguese"),
        ("The opposite of hot is", "cold"),
        ("when did the second world war end", "1945"),
        ("Bees make", "honey"),
        ("The currency of Japan is the", "yen"),
        ("What is the boiling point of water in degrees Celsius?", "100"),
        ("She opened the door and walked into the", "room"),
        ("who wrote the origin of species", "Charles Darwin"),
        ("The chemical symbol of gold is", "Au"),
        ("A triangle has", "three sides"),
        ("Which ocean lies between Africa and Australia?", "The Indian Ocean"),
        ("The first person to walk on the moon was", "Neil Armstrong"),
        ("To make bread one needs flour, water and", "yeast"),
        ("what is the tallest mountain in the world", "Mount Everest"),
        ("The game of chess is played on a board with", "64 squares"),
        ("Which animal is known for its black and white stripes?", "The zebra"),
        ("In the morning he likes to drink a cup of", "coffee"),
        ("who was the first president of the united states", "George Washington"),
    )
)

CANARIES = tuple(
    Probe("locality", prompt, answer)
    for prompt, answer in (
        ("The sun rises in the", "east"),
        ("who discovered penicillin", "Alexander Fleming"),
        ("The capital of Egypt is", "Cairo"),
        ("How many legs does a spider have?", "Eight"),
        ("A doctor works in a", "hospital"),
        ("The river that flows through London is the", "Thames"),
        ("what gas do plants take in from the air", "carbon dioxide"),
        ("Twelve divided by four is", "three"),
    )
)
