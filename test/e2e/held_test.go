package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/mantlet/mantlet/agent/hold"
	"github.com/mantlet/mantlet/sandbox/netns"
)

// What the kernel shows of a SYN hold from outside of the agent: connections that wait, what the agent has not read, and the tables.

// dialling is a set of connections that an app has begun.
type dialling struct {
	to       map[netip.AddrPort]bool // true: allowed
	outcomes chan []netns.Outcome    // takes them once all have ended
}

// heldPatience bounds a connection that is held while nobody is there: TCP sends its SYN again after 1, 3, 7, 15 and 31 seconds.
const heldPatience = 50 * time.Second

// dialAll has a pod's app begin connections to destinations, and does not wait for what becomes of them.
func dialAll(t *testing.T, from *netns.Pod, to map[string]bool) *dialling {
	t.Helper()
	d := &dialling{to: map[netip.AddrPort]bool{}, outcomes: make(chan []netns.Outcome, 1)}
	var targets []netns.Target
	for a, allowed := range to {
		dest := netip.MustParseAddrPort(a)
		d.to[dest] = allowed
		targets = append(targets, netns.Target{Addr: dest, Speaks: netns.ClientFirst, Nonce: "held", Timeout: heldPatience})
	}
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		out, err := from.Probe(ctx, targets)
		if err != nil && ctx.Err() == nil {
			t.Error(err)
		}
		d.outcomes <- out
	}()
	t.Cleanup(func() {
		cancel()
		d.outcomes <- <-d.outcomes
	})
	return d
}

// wait returns what became of the connections.
func (d *dialling) wait() []netns.Outcome {
	out := <-d.outcomes
	d.outcomes <- out
	return out
}

// waiting reports whether every connection waits for an answer to its SYN, which TCP has sent again at least so many times.
func (d *dialling) waiting(t *testing.T, from *netns.Pod, again uint8) bool {
	t.Helper()
	sent := map[netip.AddrPort]uint8{}
	if err := from.Do(func() error {
		for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
			sockets, err := netlink.SocketDiagTCP(family)
			if err != nil {
				return err
			}
			for _, s := range sockets {
				a, _ := netip.AddrFromSlice(s.ID.Destination)
				if dest := netip.AddrPortFrom(a.Unmap(), s.ID.DestinationPort); s.State == netlink.TCP_SYN_SENT {
					if n, ok := sent[dest]; !ok || s.Retrans < n {
						sent[dest] = s.Retrans
					}
				}
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	for dest := range d.to {
		if n, ok := sent[dest]; !ok || n < again {
			return false
		}
	}
	return true
}

// logSocket tells of the socket that listens to the hold's NFLOG group in a pod: how many bytes its process has not read, and how many messages
// found no room; false: nobody listens.
func logSocket(t *testing.T, p *netns.Pod) (unread, lost int, there bool) {
	t.Helper()
	if err := p.Do(func() error {
		groups, err := os.ReadFile("/proc/thread-self/net/netfilter/nfnetlink_log") // group, port of the listener, …
		if err != nil {
			return err
		}
		port := ""
		for line := range strings.Lines(string(groups)) {
			if f := strings.Fields(line); len(f) > 1 && f[0] == strconv.Itoa(int(hold.Defaults().Group)) {
				port = f[1]
			}
		}
		sockets, err := os.ReadFile("/proc/thread-self/net/netlink") // sk, protocol, port, groups, Rmem, Wmem, Dump, Locks, Drops, …
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(sockets)) {
			if f := strings.Fields(line); len(f) > 8 && f[1] == strconv.Itoa(unix.NETLINK_NETFILTER) && f[2] == port {
				if _, err := fmt.Sscan(f[4]+" "+f[8], &unread, &lost); err != nil {
					return fmt.Errorf("%s: %w", line, err)
				}
				there = true
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return unread, lost, there
}

// rulesetOf is what nftables holds in a pod, but for the elements of sets: a line for each table, set, chain and rule, sorted.
func rulesetOf(t *testing.T, p *netns.Pod) (list []string) {
	t.Helper()
	if err := p.Do(func() error {
		conn, err := nftables.New()
		if err != nil {
			return err
		}
		tables, err := conn.ListTables()
		if err != nil {
			return err
		}
		for _, table := range tables {
			list = append(list, fmt.Sprintf("table %d %s flags %#x, %d chains, sets and objects", table.Family, table.Name, table.Flags, table.Use))
			sets, err := conn.GetSets(table)
			if err != nil {
				return err
			}
			for _, s := range sets {
				list = append(list, fmt.Sprintf("set %s %s of %s, timeout %s, size %d, interval %t", table.Name, s.Name, s.KeyType.Name, s.Timeout, s.Size, s.Interval))
			}
		}
		chains, err := conn.ListChains()
		if err != nil {
			return err
		}
		for _, c := range chains {
			chain := fmt.Sprintf("chain %s %s", c.Table.Name, c.Name)
			if c.Hooknum != nil {
				chain += fmt.Sprintf(" type %s hook %d priority %d policy %d", c.Type, *c.Hooknum, *c.Priority, *c.Policy)
			}
			list = append(list, chain)
			rules, err := conn.GetRules(c.Table, c)
			if err != nil {
				return err
			}
			for i, r := range rules {
				text, err := written(c.Table.Family, r.Exprs)
				if err != nil {
					return err
				}
				list = append(list, fmt.Sprintf("%s, rule %d: %s", chain, i, text))
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	slices.Sort(list)
	return list
}

// written is a rule as it would go to the kernel, without what counts its packets.
func written(family nftables.TableFamily, exprs []expr.Any) (string, error) {
	var text strings.Builder
	for _, e := range exprs {
		if _, ok := e.(*expr.Counter); ok {
			continue
		}
		b, err := expr.Marshal(byte(family), e)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(&text, "%T %x ", e, b)
	}
	return text.String(), nil
}

// wantRuleset wants the nftables of a pod to be what they were.
func wantRuleset(t *testing.T, p *netns.Pod, before []string) {
	t.Helper()
	after := rulesetOf(t, p)
	if slices.Equal(before, after) {
		return
	}
	count := map[string]int{}
	for _, line := range before {
		count[line]--
	}
	for _, line := range after {
		count[line]++
	}
	for line, n := range count {
		if n != 0 {
			t.Errorf("%s: %+d of: %s", p.Name(), n, line)
		}
	}
}
