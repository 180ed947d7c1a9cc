import sys

from peft_baft_cli import main

sys.exit(main())
