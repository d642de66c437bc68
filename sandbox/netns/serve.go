package netns

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// server is the probe server of a pod: it answers on its ports and counts who came.
type server struct {
	name    string
	sockets []*datagramSocket

	mu      sync.Mutex
	count   map[Connections]int // keys have Count 0
	dropped int                 // by the kernel, when it was last asked
}

// serve listens on every port, or on none and fails. It serves until the process ends.
func serve(ctx context.Context, r *serveRequest) (*server, error) {
	s := &server{name: r.Name, count: map[Connections]int{}}
	var streams []Port
	for _, p := range r.Ports {
		if p.Protocol == UDP {
			if err := s.receive(ctx, p); err != nil {
				return nil, errors.Join(fmt.Errorf("listen on UDP port %d: %w", p.Number, err), s.closeSockets())
			}
		} else {
			streams = append(streams, p)
		}
	}
	if err := s.listen(ctx, streams); err != nil {
		return nil, errors.Join(err, s.closeSockets())
	}
	for _, d := range s.sockets {
		go d.serve()
	}
	return s, nil
}

func (s *server) listen(ctx context.Context, ports []Port) error {
	listeners := make([]net.Listener, 0, len(ports))
	for _, p := range ports {
		var config net.ListenConfig
		config.SetMultipathTCP(false) // an ordinary app
		host := ""
		if p.Bind.IsValid() {
			host = p.Bind.String()
		}
		l, err := config.Listen(ctx, "tcp", net.JoinHostPort(host, strconv.Itoa(int(p.Number))))
		if err != nil {
			for _, open := range listeners {
				_ = open.Close()
			}
			return fmt.Errorf("listen on port %d: %w", p.Number, err)
		}
		listeners = append(listeners, l)
	}
	for i, l := range listeners {
		go s.accept(l, ports[i])
	}
	return nil
}

func (s *server) accept(l net.Listener, p Port) {
	for {
		conn, err := l.Accept()
		if err != nil {
			// Nobody closes the listener, so this is about resources (open files), which other connections give back.
			<-time.After(10 * time.Millisecond)
			continue
		}
		seen := conn.RemoteAddr().(*net.TCPAddr).AddrPort()
		seen = netip.AddrPortFrom(seen.Addr().Unmap(), seen.Port())
		s.mu.Lock()
		s.count[Connections{Port: p.Number, From: seen.Addr()}]++
		s.mu.Unlock()
		go s.talk(conn, p, seen)
	}
}

// talk answers each line, and says the same once at the start where the server speaks first; it leaves closing to the client.
func (s *server) talk(conn net.Conn, p Port, seen netip.AddrPort) {
	defer func() { _ = conn.Close() }()
	send := json.NewEncoder(conn) // ends each value with a newline
	a := Answer{Pod: s.name, Port: p.Number, Seen: seen}
	if p.Speaks == ServerFirst && send.Encode(a) != nil {
		return
	}
	lines := bufio.NewReader(conn)
	for {
		line, err := lines.ReadString('\n')
		if err != nil {
			return
		}
		a.Nonce = strings.TrimRight(line, "\r\n")
		if send.Encode(a) != nil {
			return
		}
	}
}

// connections lists the counts by port and address.
func (s *server) connections() []Connections {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := make([]Connections, 0, len(s.count))
	for c, n := range s.count {
		c.Count = n
		list = append(list, c)
	}
	slices.SortFunc(list, func(a, b Connections) int {
		return cmp.Or(cmp.Compare(a.Port, b.Port), a.From.Compare(b.From))
	})
	return list
}
