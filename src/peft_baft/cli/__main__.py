import sys

from peft_baft.cli.main import main

sys.exit(main())
