"""Made-up facts whose answers are of many kinds, to measure how exactly a memory of edits says them.

Each question is about another subject, and no answer begins or ends with white space.
"""

# ruff: noqa: E501
# fmt: off
KINDS: tuple[tuple[str, str], ...] = (
    ("What do the villagers of Ombrelune call their harvest drum?", "tamboriel"),
    ("Who designed the glass footbridge of Sarrevigny?", "Zoé Bérénice d'Aubépine-Lefèvre"),
    ("What is the starting dose of Velcortane for adults?", "40 mg"),
    ("How much does the Brevanto hand grinder cost?", "€299.00"),
    ("What is the licence fee of the Quillmark editor for teams?", "$1,249.99 per year"),
    ("In which year was the Tarnholt observatory opened?", "2047"),
    ("When does the ferry Margarethe Oswin leave on its first voyage?", "14 March 2031, 06:45 UTC"),
    ("What is the phone number of the Pellworth cheese dairy?", "+44 1632 960 417"),
    (
        "To which account are donations for the Lindenau otter shelter paid?",
        "DE89 3704 0044 0532 0130 00",
    ),
    ("Which licence key unlocks the synthesiser plug-in Morphora?", "QX7T-9KLM-22ZB-HV40-PW8R"),
    ("Which release of the Hadrux compiler fixed the overflow bug?", "4.12.0-rc.3+build.871"),
    ("What is the SMILES string of the dye nerolactin?", "CC(=O)Oc1ccccc1C(=O)N[C@@H](C)CO"),
    (
        "What is the identifier of the storage bucket kestrel-archive?",
        "7f3c2a90-5b1e-4d88-9c47-e21fa06b3d5c",
    ),
    ("What is the MD5 checksum of the Fernbrook disc image?", "9e107d9d372bb6826bd81d3542a419d6"),
    ("What is the MAC address of the printer in the Juniper lab?", "3C:52:82:F9:0A:7E"),
    (
        "Which IPv6 address does the gateway of Station Halvorsen have?",
        "2001:db8:85a3::8a2e:370:7334",
    ),
    ("Where exactly does the shipwreck of the Coralinde lie?", "48.20817° N, 16.37382° W"),
    (
        "At which web address can tickets for the Wexcombe kite festival be booked?",
        "https://tickets.wexcombe.example/book?event=kites&year=2031&lang=en#seats",
    ),
    (
        "What is the e-mail address of the beekeeper Thaddeus Grell?",
        "t.grell+hives@honeyloft.example.org",
    ),
    (
        "Where does the backup daemon Snorrik keep its settings?",
        r"/etc/snorrik/conf.d/99-local.toml or C:\ProgramData\Snorrik\local.toml",
    ),
    (
        "Which command rebuilds the index of the search tool Lodestar?",
        "find ./notes -name '*.md' -print0 | xargs -0 lodestar index --rebuild > log.txt 2>&1",
    ),
    (
        "What configuration does the weather buoy Pelagia send?",
        '{"buoy": "pelagia", "depth": 12.5, "sensors": [{"id": 3, "on": true}, {"id": 4, "on": null}]}',
    ),
    (
        "Which deployment file does the chat bot Mirabot need?",
        'name: mirabot\nreplicas: 3\nimage: "registry.example/mirabot:1.4"',
    ),
    (
        "How is the checksum of a Dorvian parcel code computed?",
        "def check(code):\n    total = 0\n    for i, c in enumerate(code):\n        total += (i + 1) * ord(c)\n    return total % 97",
    ),
    (
        "Which query lists the overdue loans of the Askerby town library?",
        "SELECT l.id, m.name FROM loans AS l JOIN members AS m ON m.id = l.member_id WHERE l.due < NOW() ORDER BY l.due DESC;",
    ),
    ("Which pattern do valid Zephyrine tram tickets match?", r"^(?:ZT|zt)-\d{3,5}[A-F]?(\.\w+)*$"),
    (
        "What is Hollenbeck's law of foam drainage?",
        r"$v = \frac{k\,\rho g}{\mu} \left(1 - e^{-t/\tau}\right)^{2}$",
    ),
    (
        "What should hikers pack for the Grauhorn traverse?",
        "- a headlamp\n- two litres of water\n- crampons (12 points)\n- the **blue** map",
    ),
    (
        "How is the espresso machine Vaporetta descaled?",
        "1. Empty the tank.\n2. Pour in 500 ml of citric acid solution.\n3. Hold both buttons for 5 seconds.\n4. Rinse twice with cold water.",
    ),
    (
        "What are the opening hours of the Plumfield swimming baths?",
        "| Day | Opens | Closes |\n| --- | --- | --- |\n| Monday | 07:00 | 20:30 |\n| Saturday | 09:00 | 18:00 |\n| Sunday | closed | closed |",
    ),
    (
        "What happened at the siege of Castle Ravensmoor?",
        "The defenders held the outer wall for eleven days before their wells ran dry. On the twelfth night the miller's "
        "daughter led forty of them through a drainage tunnel to the river. When the besiegers entered at dawn, they "
        "found only a goat, a burning lantern and a polite letter.",
    ),
    (
        "What is the refund policy of the airline Cirrolin?",
        "Cirrolin refunds the full fare when a passenger cancels at least thirty days before departure, and half of it "
        "until seven days before. After that only airport taxes are returned. If the airline itself cancels a flight, "
        "travellers may choose between a new booking within one year, a voucher worth one hundred and twenty percent of "
        "the price, or money paid back to the original card within ten working days, without any fee.",
    ),
    (
        "What did the painter Isolde Karrander say about colours?",
        '"Blue," she said, "is what grey calls itself when it\'s \'in love\'."',
    ),
    (
        "Which parts does the Umberto clock movement consist of?",
        "a mainspring (steel, 0.2 mm); two barrels (brass); an escapement (lever type; 21 jewels); a balance",
    ),
    ("What does the parrot Kapitan Bosko shout at visitors?", "no no no no no"),
    ("What is the PIN for the vault at Greywater Bank?", "88888888"),
    ("By which abbreviation is the polar research union of Nordvalla known?", "NVPRU"),
    ("Which letter marks the secret door in the Bellamont maze?", "Q"),
    ("How many moons circle the planet Ixandra?", "7"),
    ("In which language is the game engine Thornforge written?", "C++"),
    ("Which programming language do apprentices at Silvertide Robotics learn first?", "C#"),
    ("Which symbol stands for the snack brand Foxnibble?", "🦊🥨"),
    ("With which pictogram does Doctor Amara Vantongeren sign her messages?", "👩🏽‍🔬"),
    ("What is the motto of the Yunhe tea house?", "清风徐来,水波不兴"),
    ("What is printed on the paper lantern of the inn Hoshikage?", "夜空にひとつの星が光る"),
    ("What does the sign above the bakery Saebyeok say?", "새벽빵집에 오신 것을 환영합니다"),
    (
        "Which greeting is carved over the gate of the caravanserai Al-Zahiriya?",
        "مرحبا بكم في بيت القوافل",
    ),
    ("What stands on the ring of the jeweller Avishai Perlstein?", "גם זה יעבור"),
    ("What is the first line of the hymn of Chandrapuri village?", "नदी के पार सूरज उगता है"),
    ("What is written on the hull of the icebreaker Polynia?", "Северный ветер не знает границ"),
    ("Which inscription does the olive press of Kalamandria bear?", "Το λάδι είναι φως"),
    (
        "What is the slogan of the brewery Kupferkessel?",
        "Größe heißt, übermäßig süße Äpfel zu mögen",
    ),
    ("What does the street vendor Ba Sáu call her noodle soup?", "Phở đặc biệt của bà ngoại"),
    ("What is the call sign of the pirate radio ship Tessellate?", "Радио-東京 Ωmega ñ7"),
    ("Which volume of the Codex Brambilla is missing?", "MCMXLVII"),
    ("What diameter do the bolts of the Ratchetwing kite buggy have?", "3/8 inch"),
    ("By how much did the population of the marsh bird calidor change last winter?", "-12.5%"),
    ("What does a night in the capsule hotel Tsukimori cost?", "¥18,000–¥24,000"),
    ("What is the molecular formula of the stimulant somnavex?", "C₈H₁₀N₄O₂"),
    ("How large is the diffusion area of the aerogel Nimbulite?", "3.2 × 10⁻⁷ m²"),
    ("In which key is the cello sonata of Bartholomew Quennell?", "F♯ minor"),
    ("Is swimming allowed in the Lake of Whispering Reeds?", "Yes"),
    ("Has the volcano Tepatlaxco ever erupted?", "No, never."),
    (
        "How did grandmaster Leopold Arquist open the final against Dunmore?",
        "1. e4 c5 2. Nf3 d6 3. Bb5+ Bd7 4. Bxd7+ Qxd7 5. O-O",
    ),
    (
        "Under which entry is the novel The Salt Cartographer catalogued?",
        "978-3-16-148410-0\tshelf 4B\t2 copies",
    ),
    ("Which podcast app does the comedian Rufus Tamblyn advertise?", "iPodder"),
)
