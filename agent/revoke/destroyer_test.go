package revoke

import (
	"errors"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A Destroyer resets the very sockets that it is told, and Envoy's alone.
func TestDestroyer(t *testing.T) {
	me, other := ByUser(uint32(os.Geteuid())), ByUser(1234)
	l := listen(t, "127.0.0.1:0")
	client, server := pair(t, l)
	e := ends{addressOf(client.LocalAddr()), addressOf(client.RemoteAddr())}
	k, err := openSockets(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer k.close()
	found, err := k.find([]ends{e})
	if err != nil || found[0] == nil {
		t.Fatalf("find: %v, %v", found, err)
	}
	right := Socket{Local: e.local, Remote: e.remote, Cookie: found[0].cookie}
	wrong := right
	wrong.Cookie[0]++
	nobody := Socket{Local: e.remote, Remote: e.remote, Cookie: right.Cookie}

	destroy := func(o Owner, list ...Socket) []error {
		t.Helper()
		d, err := OpenDestroyer(o)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		return d.Destroy(list)
	}
	if errs := destroy(other, right); !errors.Is(errs[0], unix.EPERM) {
		t.Errorf("a socket that is not envoy's: %v", errs)
	}
	if errs := destroy(me, wrong, nobody, Socket{}); !errors.Is(errs[0], unix.ENOENT) || !errors.Is(errs[1], unix.ENOENT) || errs[2] == nil {
		t.Errorf("sockets that are not there: %v", errs)
	}
	if _, err := client.Write([]byte("x")); err != nil {
		t.Errorf("reset although nobody asked for it: %v", err)
	}
	if errs := destroy(me, wrong, right); errs[1] != nil {
		t.Errorf("envoy's socket: %v", errs)
	}
	for _, c := range []net.Conn{client, server} {
		_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
		for {
			if _, err = c.Read(make([]byte, 1)); err != nil {
				break
			}
		}
		if isTimeout(err) {
			t.Error("it is still open")
		}
	}
}
