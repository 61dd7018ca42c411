from relook.cli import main

main()
