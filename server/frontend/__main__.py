"""`python -m server.frontend`: a front-end process."""

from server.frontend.process import main

main()
