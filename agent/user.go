package agent

import (
	"crypto/rand"
	"fmt"
	"os"

	"github.com/mantlet/mantlet/agent/envoy"
	"github.com/mantlet/mantlet/agent/netfilter"
	"github.com/mantlet/mantlet/xds/proxyuser"
)

// envoyUser is as whom Envoy runs and whom the redirect exempts. Where the agent chooses (envoy.OwnUser) that is whom an agent before this one in the
// pod has chosen, which the kernel remembers; else somebody whom nobody could know before. known: what is in the kernel already goes by that user.
func (c *Config) envoyUser() (user proxyuser.User, known bool, err error) {
	if c.Exempt != envoy.OwnUser {
		return proxyuser.User{UID: uint32(os.Geteuid()), GID: uint32(os.Getegid())}, true, nil
	}
	users, err := envoy.Users()
	if err != nil {
		return user, false, err
	}
	before, err := netfilter.Exempted()
	if err != nil {
		return user, false, err
	}
	if before != nil && users.Has(*before) {
		return *before, true, nil
	}
	return users.User(randomSeed()), false, nil
}

func randomSeed() (s proxyuser.Seed) {
	_, _ = rand.Read(s[:]) // it never fails (crypto/rand)
	return s
}

// sameUser fails where a pod's agent is another user than the one that its pod's redirect exempts: a container that is started again keeps its user.
func sameUser(before, now proxyuser.User) error {
	if before == now {
		return nil
	}
	return fmt.Errorf("the pod's agent is %s, and the redirect exempts %s, as which it ran before: nothing is exempt beside that; make the pod anew", now, before)
}
