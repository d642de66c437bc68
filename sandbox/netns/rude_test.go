package netns_test

import (
	"io"
	"net"
	"strconv"
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/mantlet/mantlet/sandbox/netns"
)

// rude are ports of a pod on which no probe server answers, each in its own way.
type rude struct {
	closing, cutting, resetting, vanishing uint16
	answering                              uint16 // answers as it should and then closes
}

func startRude(t *testing.T, pod *netns.Pod) rude {
	t.Helper()
	r := rude{closing: 1001, cutting: 1002, resetting: 1003, vanishing: 1004, answering: 1005}
	serve := func(port uint16, talk func(*net.TCPConn)) {
		var l net.Listener
		if err := pod.Do(func() (err error) { l, err = net.Listen("tcp", ":"+strconv.Itoa(int(port))); return err }); err != nil {
			t.Fatal(err)
		}
		served := make(chan struct{})
		t.Cleanup(func() { l.Close(); <-served })
		go func() {
			defer close(served)
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				talk(c.(*net.TCPConn))
				c.Close()
			}
		}()
	}
	serve(r.closing, func(*net.TCPConn) {})
	serve(r.cutting, func(c *net.TCPConn) { _, _ = io.WriteString(c, `{"p`) })
	serve(r.resetting, func(c *net.TCPConn) { // after it has read, or connect() might already tell
		_, _ = c.Read(make([]byte, 100))
		_ = c.SetLinger(0)
	})
	serve(r.answering, func(c *net.TCPConn) { _, _ = io.WriteString(c, `{"pod":"rude","port":1,"seen":"10.0.0.1:1"}`+"\n") })
	if err := pod.Do(func() error { return dropPort(r.vanishing) }); err != nil {
		t.Fatal(err)
	}
	return r
}

// dropPort drops in the current namespace what arrives for a TCP port.
func dropPort(port uint16) error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	table := c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "rude"})
	chain := c.AddChain(&nftables.Chain{Table: table, Name: "in", Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookInput, Priority: nftables.ChainPriorityFilter})
	c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Register: 1, Data: []byte{unix.IPPROTO_TCP}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Register: 1, Data: binaryutil.BigEndian.PutUint16(port)},
		&expr.Verdict{Kind: expr.VerdictDrop},
	}})
	return c.Flush()
}

// linkNames lists the interfaces of the node.
func linkNames(t *testing.T) []string {
	t.Helper()
	links, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, l := range links {
		names = append(names, l.Attrs().Name)
	}
	return names
}
