package hold

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/mantlet/mantlet/verdict"
	"github.com/mantlet/mantlet/xds/names"
	"github.com/mantlet/mantlet/xds/proxyuser"
)

// Mark is the mark of SYNs that are sent again.
const Mark = 0x6d75

// An Asker knows whether the pod may connect to a destination inside the cluster. It is called from many goroutines, once at a
// time for each destination, and must return when ctx ends. An error counts as a denial, for Config.ErrorTTL.
type Asker interface {
	Ask(ctx context.Context, dest netip.AddrPort) (allowed bool, err error)
}

// Config says what is held and how much. Start from [Defaults].
type Config struct {
	// Cluster are the prefixes whose destinations are asked about: pods and Services. Everything else is external, but for
	// Services, and NodePorts at every address.
	Cluster []netip.Prefix
	// Services are external addresses of Services, with their ports, and host ports of the own node; see Holder.SetServices.
	Services []netip.AddrPort
	// NodePorts is the range of node ports.
	NodePorts verdict.PortRange
	// Exempt are addresses whose other ports need no question: the pod's own node.
	Exempt []netip.Addr
	// External and Inbound are the pod's egress and ingress tables: their anonymous peers admit destinations, and sources, outside Cluster.
	// The zero table admits none.
	External, Inbound verdict.Table
	// ProxyMark and Users exempt the agent's and Envoy's own connections, as they do in the redirect.
	ProxyMark uint32
	Users     []proxyuser.User

	Group        uint16        // of NFLOG, one listener each in a network namespace
	Rate         uint32        // SYNs to unknown destinations a second (and at once) for each family; the kernel refuses more
	Patience     time.Duration // how long a question may take
	MaxQuestions int           // outstanding at a time; more are denied for ErrorTTL
	MaxHeld      int           // SYNs kept for outstanding questions; TCP sends the others again itself
	MaxAllowed   int           // allowed destinations
	MaxDenied    int           // denied destinations
	MaxOutside   int           // ranges of addresses and ports that External holds, and Inbound; with more that direction is left to Envoy
	Idle         time.Duration // how long a destination is kept that nobody connects to; the kernel drops it after twice as long
	ErrorTTL     time.Duration // how long no answer means no; whole milliseconds
	// Forgotten is told which destinations were let go, by age or to make room, after their elements are gone: their on-demand
	// clusters may go too. It may call the Holder. Nil: nobody is told.
	Forgotten func(dests []netip.AddrPort)
	// Binding is asked before the NFLOG group is bound, and its error is taken for the kernel's. Nil: the kernel alone says. It is for tests: a
	// kernel that has NFLOG cannot be told to have none.
	Binding func() error
	// Refused is told of connections that were refused, up to 100 a second, by their ends as the app or the peer meant them. It must
	// return at once. Nil: nobody is told.
	Refused func(Refusal)
}

// Refusal is a connection that was refused.
type Refusal struct {
	Source, Destination netip.AddrPort
	Inbound             bool // to the pod, not from it
}

// Defaults is the configuration for a pod of a cluster with these prefixes. It exempts no user.
func Defaults(cluster ...netip.Prefix) Config {
	return Config{
		Cluster: cluster, NodePorts: verdict.DefaultNodePorts, ProxyMark: names.ProxyMark, Group: 15001,
		Rate: 1024, Patience: 2 * time.Second, MaxQuestions: 512, MaxHeld: 2048, MaxAllowed: 1024, MaxDenied: 2048, MaxOutside: 20_000,
		Idle: 5 * time.Minute, ErrorTTL: 2 * time.Second,
	}
}

func (c Config) check() error {
	switch {
	case len(c.Cluster) == 0:
		return errors.New("hold: no cluster prefixes: every connection inside the cluster would be taken for an external one; name them")
	case c.NodePorts.First == 0 || c.NodePorts.First > c.NodePorts.Last:
		return fmt.Errorf("hold: node ports %s are no range; start from Defaults", c.NodePorts)
	case c.ProxyMark == 0 || c.ProxyMark == Mark:
		return fmt.Errorf("hold: mark %#x is not one that only the agent has; choose another", c.ProxyMark)
	case c.Rate == 0 || c.MaxQuestions < 1 || c.MaxHeld < 1 || c.MaxAllowed < 1 || c.MaxDenied < 1:
		return errors.New("hold: a limit is 0, so that nothing could connect; start from Defaults")
	case c.Patience <= 0 || c.Idle < time.Second || c.ErrorTTL < time.Millisecond:
		return errors.New("hold: a duration is too short (patience above 0, idle from 1s, errors from 1ms); start from Defaults")
	case slices.Contains(c.Users, proxyuser.User{UID: uint32(os.Geteuid()), GID: uint32(os.Getegid())}):
		return fmt.Errorf("hold: the redirect exempts user %d, who is the agent's: SYNs that it sends again would pass by Envoy; run the agent as another user", os.Geteuid())
	}
	for _, p := range c.Cluster {
		if p != p.Masked() || p.Addr().Is4In6() {
			return fmt.Errorf("hold: cluster prefix %s is not a masked one", p)
		}
	}
	return nil
}
