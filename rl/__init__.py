"""How the policy improves: rollouts, rewards, advantages, the policy loss and the loop that strings them together."""
