"""Whose weights may be published: a license comes from the source, or from whoever takes the responsibility."""

from vitreg_hub.errors import LicenseError

UNKNOWN = "unknown"
"""What someone says who does not know it, and the Hub's identifier for that."""

NONCOMMERCIAL = (
    "cc-by-nc",
    "apple-amlr",
    "apple-ascl",
    "fair-noncommercial-research-license",
    "intel-research",
)
"""Beginnings of the Hub's identifiers of licenses that do not allow every use. Source: the Hub's list of licenses."""
UNCLEAR = (None, "", UNKNOWN, "other")


def is_noncommercial(license: str) -> bool:
    """Whether a license forbids commercial use."""
    return license.lower().startswith(NONCOMMERCIAL)


def settle(told: str | None, given: str | None, *, called: str) -> str | None:
    """Decide under which license weights go on.

    Args:
        told: What the source says, an identifier of the Hub or of SPDX.
        given: What the user says; "unknown" goes on without knowing, where the source does not tell either.
        called: The source, for messages.

    Returns:
        The identifier in lower case; None if nobody knows.

    Raises:
        LicenseError: Nobody says; or it is a non-commercial one and the user does not say so too; or the two differ.
    """
    told, given = (None if x is None else x.strip().lower() for x in (told, given))
    if told in UNCLEAR:
        if not given:
            raise LicenseError(
                f"nothing tells the license of {called}: give it with --license, as the Hub spells it "
                "(apache-2.0, mit, cc-by-nc-4.0, ..., or unknown)."
            )
        return None if given == UNKNOWN else given
    if given not in (None, "", told) and not (given == UNKNOWN and not is_noncommercial(told)):
        raise LicenseError(f"--license {given} is not the license of {called}, which is {told}.")
    if is_noncommercial(told) and given != told:
        raise LicenseError(
            f"the license of {called} is {told}, which does not allow every use: say --license {told} if yours is one."
        )
    return told
