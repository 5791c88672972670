"""``peerd completion``"""

from __future__ import annotations

import click

SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print a script that lets a shell complete peerd's commands, options and slot numbers.

    \b
    For the current shell:
      bash   eval "$(peerd completion bash)"
      zsh    eval "$(peerd completion zsh)"      (after compinit)
      fish   peerd completion fish | source

    \b
    Permanently:
      bash   peerd completion bash > ~/.local/share/bash-completion/completions/peerd
      zsh    peerd completion zsh > "${fpath[1]}/_peerd"
      fish   peerd completion fish > ~/.config/fish/completions/peerd.fish

    'peerd restart' and 'peerd logs' then complete the slots of the running supervisor.
    """
    from click.shell_completion import get_completion_class

    complete = get_completion_class(shell)
    assert complete is not None
    click.echo(complete(ctx.find_root().command, {}, "peerd", "_PEERD_COMPLETE").source())
