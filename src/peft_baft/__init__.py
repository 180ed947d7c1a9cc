from peft_baft.adapter import BaftConfig, BaftModel
